"""The forward pass of one attention layer: a loop over the passes of the step."""

from dataclasses import replace
from typing import Any

import torch
from farspan.engine_ext.errors import UnsupportedModelError
from farspan.engine_ext.launch import (
    as_pages,
    at_true_positions,
    attend,
    choose_dense_kernel,
    write_kv,
)
from farspan.engine_ext.parts import Parts, rows_of
from farspan.engine_ext.passes import StepMetadata
from farspan.engine_ext.profile import largest_sums, run_largest_chunk
from farspan.engine_ext.star.keys import largest_gathered_keys, longest_kv_len
from farspan.engine_ext.support import check_fp8, config_of, layer_refusals, stored_dtype
from farspan.kernels.batch import FP8, KVView
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl


class FarspanImpl(AttentionImpl[StepMetadata]):
    """Attention of one layer over paged KV. Nothing in it changes once it is constructed."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Arguments are vLLM's. Raises UnsupportedModelError for a layer that farspan cannot serve."""
        vllm_config = get_current_vllm_config()
        dtype = torch.get_default_dtype()
        reasons = layer_refusals(
            head_size=head_size,
            kv_cache_dtype=kv_cache_dtype,
            dtype=dtype,
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            extra=extra,
        )
        if reasons:
            raise UnsupportedModelError(" ".join(reasons))
        # A checkpoint may ask for fp8 where the engine did not.
        check_fp8(kv_cache_dtype, vllm_config)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.kv_cache_dtype = kv_cache_dtype
        self.config = config_of(vllm_config)
        self.scale = float(scale) * (self.config.string.logit_scale if self.config.string is not None else 1.0)
        self.max_model_len = vllm_config.model_config.max_model_len
        device = torch.device(vllm_config.device_config.device_type)
        choose_dense_kernel(self.config, device, head_size, stored_dtype(kv_cache_dtype, dtype))

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's keys and values, [num_tokens, num_kv_heads, head_dim], into their pages.

        Where KV heads are cold, vLLM's pages hold the others, and `forward` writes the cold ones.
        """
        if kv_cache.shape[3] != 2 * self.head_size:  # all heads are cold, and the pages are stubs
            return
        name, num_hot_heads = str(layer.layer_name), kv_cache.shape[1]
        has_order = self.config.offload is not None and self.config.offload.head_profile is not None
        step = step_of(name) if has_order or self.config.star is not None else None
        order = None if step is None else step.layers[name].head_order
        if order is not None:
            hot = order.kv_heads[:num_hot_heads]
            key, value = key[:, hot], value[:, hot]
        elif num_hot_heads < key.shape[1]:
            key, value = key[:, :num_hot_heads], value[:, :num_hot_heads]
        if step is not None:
            key = at_true_positions(key, step.moved, step.layers[name].to_true_positions)
        pages = as_pages(kv_cache)
        write_kv(key, value, pages, slot_mapping, **scales_of(layer, pages))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StepMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write attention of [num_tokens, num_heads, head_dim] queries into `output`, of the same shape.

        The step's keys of hot heads are in the cache already; those of cold ones are written here. Rows past the
        step's tokens are padding: left as they are, or zero where heads are in another order.
        """
        assert output_scale is None, "fused output quantization is not announced"
        assert output_block_scale is None, "fused output quantization is not announced"
        step = attn_metadata
        if step is None:  # vLLM measures memory without a batch
            gathered = largest_gathered_keys(query, self.num_kv_heads, self.max_model_len)
            longest = longest_kv_len(self.max_model_len)
            run_largest_chunk(self.config.prefill, query, self.num_kv_heads, self.scale, longest)
            del gathered
            largest_sums(self.config, query, self.num_kv_heads)
            return output.fill_(0)
        name = layer.layer_name
        context = step.layers[name]
        order, in_order = context.head_order, output
        if order is not None:
            query, in_order = query[:, order.q_heads], torch.zeros_like(output)
        pages = as_pages(kv_cache)
        scales = scales_of(layer, pages)
        if step.cold is not None:
            cold = step.cold.kv_heads(name)
            heads = cold if order is None else order.kv_heads[cold]
            key = at_true_positions(key[:, heads], step.moved, context.to_true_positions)
            step.cold.write(name, key, value[:, heads], **scales)
        query = at_true_positions(query, step.moved, context.to_true_positions)
        if step.key_exchange is not None:
            pages = step.key_exchange.pages(pages)
        parts = Parts(in_order, self.num_heads // self.num_kv_heads)
        for each in step.passes:
            target, lse = parts.room(each)
            if each.keys == "cache":
                kv = KVView(pages, **scales)
            else:
                assert step.cold is not None
                kv = replace(step.cold.view(name, each), **scales)
            of_pass = rows_of(query, each.rows, parts.heads_of(each))
            lse = attend(each, of_pass, kv.of_heads(each.kv_heads), context, self.scale, target, lse)
            if each.part is not None:
                parts.add(each, lse)
        if order is not None:
            output[:, order.q_heads] = in_order
        return output


def scales_of(layer: Any, pages: torch.Tensor) -> dict[str, Any]:
    """What keys and values are divided by before they are stored in float8 pages; empty for pages of other dtypes."""
    if pages.dtype != FP8:
        return {}
    return {"key_scale": layer._k_scale_float, "value_scale": layer._v_scale_float}


def step_of(layer_name: str) -> StepMetadata | None:
    """The metadata of the step that runs an attention layer; None while vLLM measures memory."""
    metadata = get_forward_context().attn_metadata
    return metadata.get(layer_name) if isinstance(metadata, dict) else None
