"""What a worker decided at its start, as one line of JSON in the log."""

import json
from typing import Any

import msgspec
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill
from farspan.engine_ext.metadata import FarspanMetadataBuilder


def decisions_of(builders: list[FarspanMetadataBuilder]) -> dict[str, Any]:
    """The decisions of one worker, as plain values; sections that are off are None.

    builders: all of its runner's, at least one. `kernel`: of dense prefill, "cpu", "triton" or "fa3". `prefill`: the
    method's options as understood, with `crossover` "measured" where what was measured decides which chunks are dense.
    `string`: the shift in tokens, and the kernel of what is shifted. `offload`: pools of the rank, and its hot heads by
    layer.
    """
    first = builders[0]
    config = first.config
    return {
        "preset": config.preset,
        "method": str(type(config.prefill).__struct_config__.tag),
        "kernel": first.maker.dense_kernel,
        "page_size": first.page_size,
        "prefill": prefill_decisions(config.prefill),
        "string": string_decisions(first),
        "offload": offload_decisions(builders),
        "star": None if config.star is None else msgspec.to_builtins(config.star),
    }


def prefill_decisions(prefill: DensePrefill | FlexPrefill | BlockSparsePrefill) -> dict[str, Any] | None:
    options: dict[str, Any] = msgspec.to_builtins(prefill)
    del options["method"]
    if isinstance(prefill, FlexPrefill):
        by_hand = prefill.min_seq_len is not None or prefill.min_chunk_len is not None
        options["crossover"] = "by hand" if by_hand else "measured"
    return options or None


def unread_coverage(prefill: DensePrefill | FlexPrefill | BlockSparsePrefill, is_read: bool) -> str | None:
    """What to tell somebody whose `coverage_rows` measure nothing. is_read: whether the workers collect statistics."""
    if is_read or not isinstance(prefill, FlexPrefill) or prefill.coverage_rows == 0:
        return None
    return (
        f"prefill.coverage_rows={prefill.coverage_rows} measures nothing in this engine, since nobody reads it. Add "
        "--worker-extension-cls farspan.metrics.SelectionMetrics (docs/evaluation.md), or leave coverage_rows out."
    )


def string_decisions(builder: FarspanMetadataBuilder) -> dict[str, Any] | None:
    options, turn = builder.config.string, builder.turn
    if options is None or turn is None:
        return None
    return {
        # The turn reaches keys at distances of S or more.
        "shift": 1 - turn.offset,
        "window": options.window,
        "logit_scale": options.logit_scale,
        "kernel": "cpu" if builder.maker.dense_kernel == "cpu" else "triton",
    }


def offload_decisions(builders: list[FarspanMetadataBuilder]) -> dict[str, Any] | None:
    cold = next((builder.cold for builder in builders if builder.cold is not None), None)
    if cold is None:
        return None
    sizes = cold.cache.sizes
    hot = {layer.index: builder.maker.num_kv_heads for builder in builders for layer in builder.layers.values()}
    return {
        "blocks": sizes.num_blocks,
        "slots": sizes.num_slots,
        "group_size": sizes.group_size,
        "staging_pages": sizes.staging_pages,
        "host_bytes": sizes.num_blocks * sizes.page_bytes,
        "slot_bytes": sizes.num_slots * sizes.page_bytes,
        "hot_heads": [hot[index] for index in sorted(hot)],
    }


def decision_line(builders: list[FarspanMetadataBuilder]) -> str:
    """`decisions_of` as one line of JSON, keys in a fixed order."""
    return json.dumps(decisions_of(builders))
