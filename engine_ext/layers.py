"""What each layer brings to its passes: made once, when vLLM builds the metadata builder of the layer's cache group."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from farspan.engine_ext.config import BlockSparsePrefill, FarspanConfig, FlexPrefill
from farspan.engine_ext.head_profile import load_profile, order_by_score
from farspan.engine_ext.passes import HeadOrder, LayerContext
from farspan.engine_ext.selection.masks import load_mask, mask_of_layer
from farspan.engine_ext.selection.methods import FlexSelector, MaskSelector, Selector
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.engine_ext.star.positions import Turns, share_turns
from farspan.engine_ext.string import rotary_source, string_turn_for_layer
from farspan.engine_ext.support import hot_heads
from farspan.kernels.block_patterns import mask_rows
from farspan.kernels.tiles import BlockLists
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index


def make_layer_contexts(
    layer_names: list[str],
    vllm_config: Any,
    config: FarspanConfig,
    device: torch.device,
    model_of: Callable[[], torch.nn.Module],
) -> Mapping[str, LayerContext]:
    """The contexts of the layers of one KV cache group on this rank, by layer name.

    model_of: gives the loaded model; asked only where an option needs it.
    Raises ConfigError or UnsupportedModelError where a layer cannot honour the options.
    """
    indices = {name: extract_layer_index(name) for name in layer_names}
    order = sorted(indices.values())
    following: dict[int, int | None] = dict(pairwise(order))
    turns: Mapping[str, Turns] = {}
    if config.star is not None:
        source, model = rotary_source(), model_of()
        turns = share_turns({name: source.rotation_of_layer(model, name, "star") for name in layer_names}, device)
    contexts = {}
    for name, index in indices.items():
        turn = None
        if config.string is not None:
            turn = string_turn_for_layer(model_of(), vllm_config, name, config.string)
        selector = make_selector(vllm_config, config, index, device)
        heads = head_order_of(vllm_config, config, index, device)
        contexts[name] = LayerContext(index, following.get(index), turn, selector, turns.get(name), heads)
    return contexts


def head_order_of(vllm_config: Any, config: FarspanConfig, index: int, device: torch.device) -> HeadOrder | None:
    """The order of one layer's heads on this rank; None where the model's own has the hot heads first."""
    if config.offload is None or config.offload.head_profile is None:
        return None
    parallel, model_config = vllm_config.parallel_config, vllm_config.model_config
    rank, num_ranks = get_tensor_model_parallel_rank(), parallel.tensor_parallel_size
    order = order_by_score(load_profile(config.offload.head_profile), index, rank, num_ranks)
    num_hot = hot_heads(vllm_config)[index]
    if num_hot == len(order) or set(order[:num_hot]) == set(range(num_hot)):
        return None
    group = model_config.get_num_attention_heads(parallel) // len(order)
    kv_heads = torch.tensor(order)
    q_heads = (kv_heads[:, None] * group + torch.arange(group)).flatten()
    return HeadOrder(kv_heads.to(device), q_heads.to(device))


def make_selector(vllm_config: Any, config: FarspanConfig, index: int, device: torch.device) -> Selector | None:
    """The selector of one layer; None where the layer attends densely or shares its lists with all others."""
    prefill = config.prefill
    num_q_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
    if isinstance(prefill, FlexPrefill):
        return FlexSelector(SelectionStats(num_q_heads, device) if collects_statistics(vllm_config) else None)
    if isinstance(prefill, BlockSparsePrefill) and prefill.pattern == "file":
        assert prefill.mask_file is not None
        mask = mask_of_layer(
            load_mask(prefill.mask_file),
            index,
            num_q_heads,
            vllm_config.model_config.get_total_num_kv_heads(),
            get_tensor_model_parallel_rank(),
            vllm_config.parallel_config.tensor_parallel_size,
        )
        rows = mask_rows(mask)
        return MaskSelector(BlockLists(rows.block_ids.to(device), rows.block_counts.to(device)), num_q_heads)
    return None


def collects_statistics(vllm_config: Any) -> bool:
    """Whether the workers were started with an extension that reads them, as `farspan.metrics.SelectionMetrics` does.

    Adding them up costs some 20 small launches per layer and chunk.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    extension = vllm_config.parallel_config.worker_extension_cls
    return bool(extension) and getattr(resolve_obj_by_qualname(extension), "__reads_selection_stats__", False)
