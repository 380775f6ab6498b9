"""Cold KV heads inside vLLM: its pages for hot heads only, sizes decided in the core, pools made in the workers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from farspan.engine_ext.config import DensePrefill, OffloadOptions, SelectColdDecode
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.plan import OffloadSizes
from farspan.engine_ext.star.exchange import current
from farspan.host_memory import available_bytes, boot_id
from farspan.scheduler.capacity import KVLayout, bounds_bytes_of, staging_bytes_of, stub_bytes_of
from farspan.scheduler.placement import GIB, EngineLimits, decide_sizes, running_limit
from farspan.vllm_compat.platform import chooses_farspan, num_replicas
from farspan.vllm_compat.wrapping import wrap_once

AUTO_SHARE = 0.6
"""Of the free host memory, with host_memory "auto"."""

_host_budgets: ContextVar[list[int] | None] = ContextVar("farspan_host_budgets", default=None)
"""Bytes of host memory for KV that each rank may take, while an engine with cold heads plans its KV cache."""


def cold_options(vllm_config: Any) -> OffloadOptions | None:
    """The offload options of an engine with cold heads; None for all others."""
    from farspan.engine_ext.support import config_of, has_cold_heads

    if not chooses_farspan(vllm_config):
        return None
    return config_of(vllm_config).offload if has_cold_heads(vllm_config) else None


# The planner knows the memory of GPUs alone, and a backend is not asked about sizes. Drop when a backend can say how
# many blocks it has memory for (not in 0.33).
def follow_planning() -> None:
    """Decide, in the core, how many blocks and slots an engine with cold heads has."""
    from vllm.v1.engine import core

    wrap_once(core.EngineCore, "_initialize_kv_caches", asking_for_host_memory)
    wrap_once(core, "get_kv_cache_configs", planning)


def asking_for_host_memory(stock: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if cold_options(vllm_config) is None:
            return stock(self, vllm_config, *args, **kwargs)
        executor = self.model_executor
        machines = executor.collective_rpc(machine_of)
        token = _host_budgets.set(executor.collective_rpc(host_budget, args=(machines,)))
        try:
            return stock(self, vllm_config, *args, **kwargs)
        finally:
            _host_budgets.reset(token)

    return _initialize_kv_caches


def machine_of(worker: Any) -> str:
    """A name of the machine that a rank runs on; containers of one machine have the same."""
    return boot_id()


def host_budget(worker: Any, machines: Sequence[str]) -> int:
    """Bytes of host memory that one rank may take for KV; runs in the worker. Raises ConfigError.

    machines: of all ranks, see `machine_of`. The option is per machine, which other hosts of Star Attention may share,
    and a tensor-parallel group may span several. A host that replaces a lost one takes what that had, as requests were
    planned by it, and the other hosts have theirs already.
    """
    options = cold_options(worker.vllm_config)
    assert options is not None
    engine_ranks, exchange = machines.count(machine_of(worker)), current()
    num_engines = num_replicas(worker.vllm_config.parallel_config)
    num_ranks = engine_ranks * num_engines * (1 if exchange is None else exchange.num_on_machine)
    available = available_bytes()
    if exchange is not None and exchange.host_bytes is not None:
        if exchange.host_bytes * engine_ranks > available:
            raise ConfigError(
                f"a host that replaces a lost one needs as much host memory for KV, "
                f"{exchange.host_bytes * engine_ranks / GIB:.1f} GiB; this machine, or its limit for this job, has "
                f"{available / GIB:.1f} GiB free. Free some, or ask again, which starts all hosts anew."
            )
        return exchange.host_bytes
    if options.host_memory == "auto":
        return int(available * AUTO_SHARE) // num_ranks
    wanted = int(options.host_memory * GIB) // num_ranks
    # Of the ranks of other engines that share the machine, some may have theirs already.
    if wanted * engine_ranks > available:
        most = available * num_ranks / engine_ranks
        raise ConfigError(
            f"offload.host_memory={options.host_memory}; allowed: up to {most / GIB:.1f} GiB, as this machine, or its "
            "limit for this job, has no more free. Lower it, or use 'auto'."
        )
    return wanted


def planning(stock: Callable[..., Any]) -> Callable[..., Any]:
    # From 0.33 on the groups of the layers come last.
    def get_kv_cache_configs(
        vllm_config: Any, kv_cache_specs: Sequence[Mapping[str, Any]], available_memory: Sequence[int], *rest: Any
    ) -> Any:
        budgets = _host_budgets.get()
        if budgets is None:
            return stock(vllm_config, kv_cache_specs, available_memory, *rest)
        options = cold_options(vllm_config)
        assert options is not None
        layout = kv_layout(vllm_config, kv_cache_specs[0])
        limits = engine_limits(vllm_config)
        gpu_bytes = min(available_memory) - selection_bytes(vllm_config, layout)
        sizes = decide_sizes(options, layout, limits, gpu_bytes, min(budgets))
        needed = sizes.num_blocks * layout.hot_block_bytes
        configs = stock(vllm_config, kv_cache_specs, [needed] * len(available_memory), *rest)
        for each in configs:
            assert each.num_blocks == sizes.num_blocks, (each.num_blocks, sizes)
            # The scheduler's copy and the workers' have it too.
            each.farspan_offload = sizes
        tell_sizes(sizes, layout, limits)
        warn_of_ordinary_memory(vllm_config.device_config.device_type)
        return configs

    return get_kv_cache_configs


def kv_layout(vllm_config: Any, specs: Mapping[str, Any]) -> KVLayout:
    """The KV of one rank, from the specs of its layers."""
    some = next(iter(specs.values()))
    element_bytes = some.dtype.itemsize
    hot_heads = tuple(hot_heads_by_layer(vllm_config, specs).values())
    num_cold = sum(some.num_kv_heads - count for count in hot_heads)
    options = cold_options(vllm_config)
    is_selective = options is not None and isinstance(options.cold_decode, SelectColdDecode)
    layout = KVLayout(
        num_kv_heads=some.num_kv_heads,
        head_dim=some.head_size,
        element_bytes=element_bytes,
        page_size=some.block_size,
        hot_heads=hot_heads,
        stub_bytes=stub_bytes_of(some.block_size, element_bytes),
        bounds_bytes=bounds_bytes_of(num_cold, some.block_size, some.head_size, element_bytes) if is_selective else 0,
    )
    assert layout.hot_block_bytes == sum(spec.page_size_bytes for spec in specs.values())
    return layout


def most_requests_of(vllm_config: Any) -> int:
    """Rows of a step's batch, padding included."""
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, graphs)


def selection_bytes(vllm_config: Any, layout: KVLayout) -> int:
    """GPU memory of the buffers and records of selective decode, beside the bounds of blocks."""
    if not layout.bounds_bytes:
        return 0
    model_config, num_reqs = vllm_config.model_config, most_requests_of(vllm_config)
    group_size = model_config.get_num_attention_heads(vllm_config.parallel_config) // layout.num_kv_heads
    max_pages = -(-model_config.max_model_len // layout.page_size) + 1
    of_pages = num_reqs * max_pages * (4 + layout.max_cold_heads * (4 + 8 * group_size))
    num_cold = layout.cold_block_bytes // layout.page_bytes
    return of_pages + num_reqs * num_cold * group_size * (layout.head_dim * layout.element_bytes + 8)


def engine_limits(vllm_config: Any) -> EngineLimits:
    return EngineLimits(
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        num_blocks_override=vllm_config.cache_config.num_gpu_blocks_override,
        is_len_fitted=getattr(vllm_config.model_config, "original_max_model_len", None) == -1,
        has_spans=has_spans(vllm_config),
    )


def has_spans(vllm_config: Any) -> bool:
    """Whether no request chooses among all keys of a head, which spans of the context would not let it, nor sees ranges
    of them, which are staged whole.
    """
    from farspan.engine_ext.support import config_of

    config = config_of(vllm_config)
    return config.star is None and isinstance(config.prefill, DensePrefill)


def tell_sizes(sizes: OffloadSizes, layout: KVLayout, limits: EngineLimits) -> None:
    from vllm.logger import init_logger

    logger = init_logger("vllm.farspan")
    page = layout.cold_block_bytes
    logger.info(
        "farspan offload, per rank: %d blocks of %d tokens, of which host memory holds the cold heads (%.2f GiB) and "
        "GPU memory %d at a time (%.2f GiB); prefill stages %d KV heads at a time, %d tokens of each (%.2f GiB)",
        sizes.num_blocks,
        sizes.page_size,
        sizes.num_blocks * page / GIB,
        sizes.num_slots,
        sizes.num_slots * page / GIB,
        sizes.group_size if sizes.staging_pages else 0,
        min(sizes.staging_pages * sizes.page_size, limits.max_model_len),
        staging_bytes_of(layout, sizes.group_size, sizes.staging_pages * sizes.page_size) / GIB,
    )
    running = running_limit(sizes, limits.max_num_batched_tokens, limits.max_num_seqs)
    if running < limits.max_num_seqs:
        logger.warning(
            "farspan offload: at most %d requests run at once, not max_num_seqs=%d, so that the pages that a step "
            "writes always find room in GPU memory",
            running,
            limits.max_num_seqs,
        )


def warn_of_ordinary_memory(device_type: str) -> None:
    """Say that host memory is not registered with a GPU, where there is none; see `make_cold_cache`."""
    from vllm.logger import init_logger

    if device_type != "cuda":
        init_logger("vllm.farspan").warning(
            "farspan offload: pages of cold heads lie in ordinary memory, as the platform %r has none that can be "
            "pinned for a GPU: offload saves nothing there, and is for tests",
            device_type,
        )


def hot_heads_by_layer(vllm_config: Any, layer_names: Mapping[str, Any]) -> dict[str, int]:
    """Hot KV heads of this rank by the name of the layer, in the order in which the layers run."""
    from farspan.engine_ext.support import hot_heads
    from vllm.model_executor.models.utils import extract_layer_index

    counts = hot_heads(vllm_config)
    names = sorted(layer_names, key=extract_layer_index)
    return {name: counts[extract_layer_index(name)] for name in names}


# customize_spec is told neither the layer nor the options. Drop when it is (not in 0.33).
def shrinking_pages(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Pages of vLLM's own cache hold hot heads only; a layer without any has stubs of two bytes a token or four."""

    def get_kv_cache_spec(self: Any, *args: Any, **kwargs: Any) -> Any:
        specs = stock(self, *args, **kwargs)
        if cold_options(self.vllm_config) is None:
            return specs
        hot = hot_heads_by_layer(self.vllm_config, specs)
        return {name: shrunk(spec, hot[name]) for name, spec in specs.items()}

    return get_kv_cache_spec


def shrunk(spec: Any, num_hot_heads: int) -> Any:
    if num_hot_heads == spec.num_kv_heads:
        return spec
    if num_hot_heads > 0:
        return dataclasses.replace(spec, num_head_slots=num_hot_heads)
    # The planner divides by the bytes of a page.
    return dataclasses.replace(spec, num_head_slots=1, state_content_bytes=spec.dtype.itemsize)


def make_cold_cache(runner: Any, kv_cache_config: Any) -> Any | None:
    """The pools of one rank's cold heads; None where it has none.

    Graphs are captured once before sizes are known, to see how much memory they take: then there is one slot alone.
    """
    vllm_config = runner.vllm_config
    if cold_options(vllm_config) is None:
        return None
    import torch
    from farspan.engine_ext.offload.cache import ColdCache
    from farspan.engine_ext.offload.pool import make_host_pool
    from farspan.kernels.batch import FP8
    from farspan.kernels.page_choice import Rule
    from vllm.model_executor.models.utils import extract_layer_index

    specs = layer_specs(kv_cache_config)
    hot = hot_heads_by_layer(vllm_config, specs)
    spec = next(iter(specs.values()))
    sizes = getattr(kv_cache_config, "farspan_offload", None)
    host_blocks = kv_cache_config.num_blocks
    if sizes is None:
        host_blocks = 1
        sizes = OffloadSizes(
            num_blocks=kv_cache_config.num_blocks,
            num_slots=1,
            page_size=spec.block_size,
            page_bytes=0,
            group_size=1,
            staging_pages=0,
        )
    shape = (spec.block_size, 2 * spec.head_size)
    cold = [spec.num_kv_heads - count for count in hot.values() if count < spec.num_kv_heads]
    # vLLM stores float8 as bytes.
    dtype = FP8 if spec.dtype == torch.uint8 else spec.dtype
    host = make_host_pool(
        cold,
        (host_blocks, *shape),
        dtype,
        register=runner.device.type == "cuda",
        progress=tell_progress(sum(cold) * host_blocks * shape[0] * shape[1] * spec.dtype.itemsize),
    )
    # Kernels may multiply what stands behind the end of a request by zero: it must be finite.
    slots = torch.zeros(sum(cold), sizes.num_slots, *shape, dtype=dtype, device=runner.device)
    scheduler, graphs = vllm_config.scheduler_config, vllm_config.compilation_config.max_cudagraph_capture_size or 0
    cache = ColdCache(
        hot,
        spec.num_kv_heads,
        sizes,
        host,
        slots,
        max_num_reqs=most_requests_of(vllm_config),
        max_num_tokens=max(scheduler.max_num_batched_tokens, graphs),
        max_model_len=vllm_config.model_config.max_model_len,
    )
    options = cold_options(vllm_config)
    assert options is not None
    if isinstance(options.cold_decode, SelectColdDecode):
        rule = Rule(options.cold_decode.coverage, options.cold_decode.certified)
        num_q_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        cache.select(rule, {name: extract_layer_index(name) for name in hot}, num_q_heads // spec.num_kv_heads)
    cache.warm_up()
    return cache


def layer_specs(kv_cache_config: Any) -> dict[str, Any]:
    """The spec of every layer."""
    specs = {}
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        for name in group.layer_names:
            specs[name] = getattr(spec, "kv_cache_specs", {}).get(name, spec)
    return specs


def tell_progress(num_bytes: int) -> Callable[[float], None]:
    """What to call as host memory is registered."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.farspan")

    def progress(share: float) -> None:
        if num_bytes >= GIB:
            logger.info("farspan offload: %.0f of %.0f GiB of host memory", share * num_bytes / GIB, num_bytes / GIB)

    return progress
