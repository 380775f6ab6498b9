"""How large the pools of an engine with cold KV heads are: `capacity` asked by the engine, refusals in sentences."""

from dataclasses import dataclass
from itertools import pairwise

from farspan.engine_ext.config import OffloadOptions, SelectColdDecode
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError
from farspan.engine_ext.plan import OffloadSizes
from farspan.scheduler.capacity import (
    KVLayout,
    Load,
    group_sizes,
    least_span_pages,
    longest_context,
    min_slots,
    needed_blocks,
    plan_kv,
    staging_bytes_of,
)
from farspan.scheduler.rates import MEASURED
from farspan.scheduler.residency import most_requests

GIB = 1 << 30
GROUP_SECONDS = 56e-6
"""What a group of a layer costs in a prefill step. H200, 2026-11: 0.45 ms for a layer of eight groups of one head
(docs/decisions/offload.md)."""


@dataclass(frozen=True)
class EngineLimits:
    """What the engine was started with."""

    max_model_len: int
    """Tokens of a request."""
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks_override: int | None = None
    is_len_fitted: bool = False
    """Whether vLLM chooses max_model_len by what fits."""
    has_spans: bool = True
    """Whether prefill may attend to the context span by span, and cut it into other chunks than vLLM: not where it
    chooses among all keys of a head, nor on a host of Star Attention."""

    def load(self, context_len: int) -> Load:
        """One request of a length: what an engine must hold. More run at once as far as slots allow."""
        return Load(
            context_len=context_len,
            num_requests=1,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=1,
        )


def decide_sizes(
    options: OffloadOptions, layout: KVLayout, limits: EngineLimits, gpu_bytes: int, host_bytes: int
) -> OffloadSizes:
    """Share out the GPU and host memory of a rank.

    gpu_bytes, host_bytes: for KV, of the rank that has least.
    Raises ConfigError or UnsupportedEngineError with a sentence where a request of max_model_len has no room.
    """
    cold_bytes, page_size = layout.cold_block_bytes, layout.page_size
    group_size = None if options.group_size == "auto" else min(options.group_size, layout.max_cold_heads)
    if options.host_memory == "auto":
        most_blocks = needed_blocks(limits.max_model_len, page_size, limits.max_num_seqs)
        host_bytes = min(host_bytes, most_blocks * cold_bytes)
    override = limits.num_blocks_override
    if override is not None:
        if override * cold_bytes > host_bytes:
            raise ConfigError(
                f"num_gpu_blocks_override={override}; allowed: up to {host_bytes // cold_bytes} blocks, as "
                f"{host_bytes / GIB:.1f} GiB of host memory a rank hold no more "
                f"(offload.host_memory={options.host_memory!r}). Lower it, or raise host_memory."
            )
        host_bytes = override * cold_bytes
    context_len = limits.max_model_len
    if limits.is_len_fitted:
        context_len = longest_context(
            layout, limits.load(1), gpu_bytes, host_bytes, context_len, group_size, has_spans=limits.has_spans
        )
    plan = None
    if context_len > 0:
        load = limits.load(context_len)
        plan = plan_kv(layout, load, gpu_bytes, host_bytes, group_size, override, has_spans=limits.has_spans)
    if plan is None:
        raise UnsupportedEngineError(refusal(layout, limits, gpu_bytes, host_bytes, group_size or 1))
    if override is not None and plan.num_blocks < override:
        raise ConfigError(
            f"num_gpu_blocks_override={override}; allowed: up to {plan.num_blocks} blocks, as {gpu_bytes / GIB:.2f} "
            "GiB of GPU memory for KV hold no more. Lower it."
        )
    larger_groups: tuple[tuple[int, int], ...] = ()
    if group_size is None and plan.staging_pages:
        larger_groups = groups_of_short_requests(layout, plan.group_size, plan.staging_pages)
    return OffloadSizes(
        num_blocks=plan.num_blocks,
        num_slots=plan.num_slots,
        page_size=page_size,
        page_bytes=cold_bytes,
        group_size=max(plan.group_size, 1),
        staging_pages=plan.staging_pages,
        is_selective=isinstance(options.cold_decode, SelectColdDecode),
        larger_groups=larger_groups,
        short_chunk_early=limits.has_spans and plan.staging_pages > 0,
    )


def groups_of_short_requests(layout: KVLayout, group_size: int, staging_pages: int) -> tuple[tuple[int, int], ...]:
    """`OffloadSizes.larger_groups`: what a buffer for `group_size` heads of `staging_pages` has room for.

    Every group of every layer costs some time, and the first group of a step waits for its pages: a larger one is
    taken where it saves more of the former than it adds to the latter.
    """
    num_layers = sum(hot < layout.num_kv_heads for hot in layout.hot_heads)
    page_seconds = layout.page_bytes / (MEASURED.host_gbs * 1e9)
    found: list[tuple[int, int]] = []
    for smaller, larger in pairwise(group for group in group_sizes(layout) if group >= group_size):
        fewer = -(-layout.max_cold_heads // smaller) - -(-layout.max_cold_heads // larger)
        pays_to = int(num_layers * fewer * GROUP_SECONDS / ((larger - smaller) * page_seconds))
        found.append((min(pays_to, group_size * staging_pages // larger), larger))
    return tuple((most, group) for most, group in reversed(found) if most > 0)


def refusal(layout: KVLayout, limits: EngineLimits, gpu_bytes: int, host_bytes: int, group_size: int) -> str:
    """Why an engine has no room for one request, and what to do."""
    num_blocks, cold_bytes = needed_blocks(limits.max_model_len, layout.page_size), layout.cold_block_bytes
    if num_blocks * cold_bytes > host_bytes:
        return (
            f"offload: max_model_len={limits.max_model_len} needs {num_blocks} blocks of {layout.page_size} tokens, "
            f"{host_bytes / GIB:.2f} GiB of host memory a rank hold {host_bytes // cold_bytes}. Raise "
            "offload.host_memory or lower --max-model-len."
        )
    page_size, tokens = layout.page_size, limits.max_num_batched_tokens
    fewest = min_slots(tokens, page_size, 1)
    if limits.has_spans:
        staged = least_span_pages(limits.max_model_len, tokens, page_size) * page_size
        why = f"{staged} tokens, as a chunk needs"
    else:
        staged = limits.max_model_len
        why = f"max_model_len={staged}, as only prefill.method 'dense' goes over a context in spans, and no Star host"
    of_blocks, of_slots = num_blocks * layout.fixed_block_bytes, fewest * cold_bytes
    of_buffers = staging_bytes_of(layout, group_size, staged)
    return (
        f"offload: {gpu_bytes / GIB:.2f} GiB of GPU memory for KV, {(of_blocks + of_slots + of_buffers) / GIB:.2f} "
        f"needed: {of_blocks / GIB:.2f} for {num_blocks} blocks of hot heads, {of_slots / GIB:.2f} for the {fewest} "
        f"pages that a step of {tokens} tokens writes, and {of_buffers / GIB:.2f} for two buffers that hold "
        f"{group_size} KV heads of {why}. Lower --max-num-batched-tokens, --max-model-len, offload.hot_heads or "
        "offload.group_size, or give more GPU memory."
    )


def running_limit(sizes: OffloadSizes, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Requests that may run at once: with more, the pages that one step writes might not find slots."""
    if sizes.num_slots >= sizes.num_blocks:
        return max_num_seqs
    return min(max_num_seqs, most_requests(max_num_batched_tokens, sizes.num_slots, sizes.page_size))
