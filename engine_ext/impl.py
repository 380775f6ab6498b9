"""The forward pass of one attention layer: choose the path, launch, nothing else."""

from collections import Counter
from typing import Any

import torch
from farspan.engine_ext.config import DensePrefill
from farspan.engine_ext.dispatch import make_launcher
from farspan.engine_ext.errors import UnsupportedModelError
from farspan.engine_ext.metadata import PrefillGroup, StepMetadata
from farspan.engine_ext.requests import source_of
from farspan.engine_ext.selection.methods import LayerShape, SparsePrefill, make_sparse_prefill
from farspan.engine_ext.support import config_of, layer_refusals
from farspan.kernels.rotary_turn import RotaryShift
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl

# vLLM prints only its own loggers' names, so this one lies under them.
logger = init_logger("vllm.farspan")


class FarspanImpl(AttentionImpl[StepMetadata]):
    """Attention of one layer over paged KV."""

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
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.kv_cache_dtype = kv_cache_dtype
        self.config = config_of(vllm_config)
        self.scale = float(scale) * (self.config.string.logit_scale if self.config.string is not None else 1.0)
        # The metadata builder sets the shift once the model is complete; from here on it can reach the runner.
        self.string: RotaryShift | None = None
        source_of(vllm_config)
        device = torch.device(vllm_config.device_config.device_type)
        self.launcher = make_launcher(self.config, device, head_size, dtype)
        layer = LayerShape(
            # Layers are constructed in order, and each registers itself once its impl is there.
            layer_index=len(vllm_config.compilation_config.static_forward_context),
            num_q_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            total_num_kv_heads=vllm_config.model_config.get_total_num_kv_heads(),
            scale=self.scale,
            tp_rank=get_tensor_model_parallel_rank(),
            tp_size=vllm_config.parallel_config.tensor_parallel_size,
            device=device,
        )
        self.sparse: SparsePrefill | None = make_sparse_prefill(self.config.prefill, layer)
        self.launches: Counter[str] = Counter()
        logger.info_once("farspan attention on %s: %s", device, self.config)

    def shift_positions(self, string: RotaryShift) -> None:
        """Attend, and select blocks, under shifted positions from now on; before vLLM's first batch."""
        self.string = string
        if self.sparse is not None:
            self.sparse.string = string

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's keys and values, [num_tokens, num_kv_heads, head_dim], into their pages."""
        self.launcher.write_kv(key, value, kv_cache, slot_mapping)

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

        The step's keys are in the cache already. Rows past the step's tokens are padding and left as they are.
        """
        assert output_scale is None, "fused output quantization is not announced"
        assert output_block_scale is None, "fused output quantization is not announced"
        step = attn_metadata
        if step is None:  # vLLM measures memory without a batch
            return output.fill_(0)
        if step.num_decodes:
            rows = slice(0, step.num_decodes)
            self.launcher.decode(query[rows], kv_cache, step, self.scale, self.string, output[rows])
            self.launches["decode"] += 1
        for group in step.prefill_groups:
            self.prefill(query, kv_cache, group, output)
        return output

    def prefill(self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup, output: torch.Tensor) -> None:
        rows = slice(group.token_start, group.token_start + group.num_tokens)
        query, output = query[rows], output[rows]
        string = group.shift_of(self.string)
        if self.sparse is None or isinstance(group.prefill, DensePrefill):
            self.launcher.prefill(query, kv_cache, group, None, self.scale, string, output)
            self.launches["prefill_dense"] += 1
            return
        block_lists = self.sparse.block_lists_for(query, kv_cache, group)
        lse = None
        if self.sparse.measures:
            lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
        self.launcher.prefill(query, kv_cache, group, block_lists, self.scale, string, output, lse)
        self.launches["prefill_sparse"] += 1
        if lse is None:
            return
        short = self.sparse.measure(query, kv_cache, group, lse)
        if short is not None:
            # Launched whether a head is short or not: to know would be to wait for the device.
            self.launcher.prefill(query, kv_cache, group, None, self.scale, string, output, lse, short)
            self.launches["prefill_repair"] += 1
