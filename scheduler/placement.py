"""How large the pools of an engine with cold KV heads are."""

from dataclasses import dataclass

from farspan.engine_ext.config import OffloadOptions
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError
from farspan.engine_ext.plan import OffloadSizes
from farspan.scheduler.residency import most_requests

GIB = 1 << 30
NUM_BUFFERS = 2
"""Staging buffers: one is filled while attention reads the other."""
STAGING_SHARE = 4
"""With group_size "auto" staging takes at most one in so many bytes of the GPU memory for KV."""


@dataclass(frozen=True)
class RankShape:
    """The KV of one rank; all ranks have the same."""

    hot_heads: tuple[int, ...]
    """Per layer."""
    num_kv_heads: int
    """Of a layer."""
    page_size: int
    """Tokens."""
    head_page_bytes: int
    """A page of one head: keys and values."""
    gpu_block_bytes: int
    """What one of vLLM's blocks takes of GPU memory: pages of the hot heads, and stubs of layers without any."""

    @property
    def num_cold_rows(self) -> int:
        """Cold heads of all layers."""
        return sum(self.num_kv_heads - hot for hot in self.hot_heads)

    @property
    def most_cold_heads(self) -> int:
        """Of the layer that has most."""
        return self.num_kv_heads - min(self.hot_heads)

    @property
    def cold_page_bytes(self) -> int:
        """A block's pages of all cold heads: in a slot, and in host memory."""
        return self.num_cold_rows * self.head_page_bytes


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


def decide_sizes(
    options: OffloadOptions, shape: RankShape, limits: EngineLimits, gpu_bytes: int, host_bytes: int
) -> OffloadSizes:
    """Share out the GPU and host memory of a rank.

    gpu_bytes, host_bytes: for KV, of the rank that has least. Blocks are as many as host memory holds and GPU memory
    leaves room for; what GPU memory has left after them are slots.
    Raises ConfigError or UnsupportedEngineError with a sentence where a request of max_model_len has no room.
    """
    page_size, cold_bytes = shape.page_size, shape.cold_page_bytes
    request_pages = -(-limits.max_model_len // page_size)
    host_blocks = host_bytes // cold_bytes
    if options.host_memory == "auto":
        host_blocks = min(host_blocks, limits.max_num_seqs * request_pages + 1)
    override = limits.num_blocks_override
    if override is not None and override > host_blocks:
        raise ConfigError(
            f"num_gpu_blocks_override={override}; allowed: up to {host_blocks} blocks, as {host_bytes / GIB:.1f} GiB "
            f"of host memory a rank hold no more (offload.host_memory={options.host_memory!r}). Lower it, or raise "
            "host_memory."
        )
    if limits.is_len_fitted:
        request_pages = max(min(request_pages, host_blocks - 1), 1)

    min_slots = 3 + limits.max_num_batched_tokens // page_size
    wanted_slots = 1 + limits.max_num_batched_tokens // page_size + 2 * limits.max_num_seqs
    # Half of the memory at most, unless fewer could not hold a step.
    wanted_slots = max(min(wanted_slots, gpu_bytes // 2 // cold_bytes), min_slots)
    group_size = staging_group_size(options, shape, request_pages, gpu_bytes)
    staging_bytes = NUM_BUFFERS * group_size * request_pages * shape.head_page_bytes
    num_blocks = most_blocks = override if override is not None else host_blocks
    if gpu_bytes - num_blocks * shape.gpu_block_bytes >= num_blocks * cold_bytes:
        # Everything fits: nothing is ever staged.
        num_slots, staging_pages = num_blocks, 0
    else:
        staging_pages = request_pages
        left = gpu_bytes - staging_bytes
        if override is None:
            num_blocks = min(host_blocks, max(left - wanted_slots * cold_bytes, 0) // shape.gpu_block_bytes)
        num_slots = min((left - num_blocks * shape.gpu_block_bytes) // cold_bytes, num_blocks)
    if num_slots < min(min_slots, most_blocks):
        raise UnsupportedEngineError(
            f"offload: {gpu_bytes / GIB:.2f} GiB of GPU memory for KV hold {max(num_slots, 0)} pages of the cold heads "
            f"beside {staging_bytes / GIB:.2f} GiB of staging for prefill; a step of {limits.max_num_batched_tokens} "
            f"tokens writes to {min_slots} of {cold_bytes / GIB:.4f} GiB. Lower --max-num-batched-tokens, "
            "--max-model-len or offload.group_size, or give more GPU memory."
        )
    if num_blocks < request_pages + 1:
        limit = f"{host_bytes / GIB:.2f} GiB of host memory" if num_blocks == host_blocks else "GPU memory"
        raise UnsupportedEngineError(
            f"offload: max_model_len={limits.max_model_len} needs {request_pages + 1} blocks of {page_size} tokens, "
            f"{limit} for KV hold {num_blocks}. Raise offload.host_memory or lower --max-model-len."
        )
    return OffloadSizes(
        num_blocks=num_blocks,
        num_slots=num_slots,
        page_size=page_size,
        page_bytes=cold_bytes,
        group_size=group_size,
        staging_pages=staging_pages,
    )


def staging_group_size(options: OffloadOptions, shape: RankShape, request_pages: int, gpu_bytes: int) -> int:
    """KV heads that are staged together: as the option says, or the largest divisor that staging has memory for."""
    most = shape.most_cold_heads
    if options.group_size != "auto":
        return min(options.group_size, most)
    buffer_bytes = gpu_bytes // STAGING_SHARE // NUM_BUFFERS
    fitting = buffer_bytes // (request_pages * shape.head_page_bytes)
    return max(size for size in range(1, most + 1) if most % size == 0 and size <= max(fitting, 1))


def running_limit(sizes: OffloadSizes, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Requests that may run at once: with more, the pages that one step writes might not find slots."""
    if sizes.num_slots >= sizes.num_blocks:
        return max_num_seqs
    return min(max_num_seqs, most_requests(max_num_batched_tokens, sizes.num_slots, sizes.page_size))
