"""A capacity plan: what contexts take of a GPU and a host, without offload and with it, and how long they run."""

import math
from dataclasses import dataclass, field
from typing import Any

from farspan.engine_ext.errors import ConfigError
from farspan.model_shape import ELEMENT_BYTES, ModelInfo
from farspan.scheduler.capacity import (
    NULL_BLOCKS,
    KVLayout,
    KVPlan,
    Load,
    group_sizes,
    longest_context,
    needed_blocks,
    plan_kv,
    stub_bytes_of,
)
from farspan.scheduler.footprint import activation_bytes, fixed_bytes, kv_heads_of_rank, weight_bytes
from farspan.scheduler.rates import GPUS, MEASURED_GPU, Rates, decode_seconds, override, prefill_seconds, rates_of

GIB = 2**30
STEP_TOKENS = (8192, 4096, 2048, 1024, 512)
"""Steps that are tried where the user names none: the longest with which the asked context fits."""
LADDER = tuple(1024 * 4**power for power in range(1, 8))
"""Contexts that are shown where the user asks for none: 4K, 16K, … as far as they fit."""
POSITIONS, GPU_MEMORY, HOST_MEMORY = "the model's positions", "GPU memory", "host memory"


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What `farspan plan` was asked. Memory in bytes, lengths in tokens."""

    model: str
    gpu: str = MEASURED_GPU
    gpu_memory: int
    """Of each GPU."""
    gpu_memory_utilization: float = 0.92
    """As vLLM's option and default."""
    host_memory: int | None = None
    """Of the machine, for KV, over all its ranks; None for no offload."""
    context: int | None = None
    """None for as long as possible."""
    concurrency: int = 1
    tensor_parallel_size: int = 1
    page_size: int = 128
    dtype: str = "auto"
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    """As vLLM's options: what the shape was read with."""
    max_num_batched_tokens: int | None = None
    """None for the longest of STEP_TOKENS that fits."""
    hot_heads: int = 0
    """In each layer, over all ranks."""
    group_size: int | None = None
    """None for as many as fit."""
    weights: int | None = None
    """Of the whole model; None for what its files or its configuration say."""
    tflops: float | None = None
    hbm_gbs: float | None = None
    pcie_gbs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """An engine that is started for one context. All but `context` and `fits` are None where it does not fit."""

    context: int
    fits: bool
    max_requests: int | None = None
    """Requests of this length that the blocks hold at once, with all of the host memory."""
    hot_heads: int | None = None
    num_slots: int | None = None
    group_size: int | None = None
    staging_bytes: int | None = None
    span_len: int | None = None
    """Tokens of the context that a staging buffer holds of each head; 0 where nothing is staged."""
    host_bytes: int | None = None
    """Host memory of a rank that those `concurrency` requests need."""
    share_in_hbm: float | None = None
    """Of the KV of `concurrency` requests of this length."""
    first_token_s: float | None = None
    """One prompt of this length, alone; None where no rate is known."""
    waiting_s: float | None = None
    """Of it, what prefill waits for host memory, and what spans cost."""
    token_ms: float | None = None
    """One step in which each of `concurrency` requests of this length makes a token."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way to hold KV."""

    longest_context: int
    """Tokens; 0 where not even one page fits."""
    limited_by: str
    hbm_bytes_per_token: int
    """KV of one rank that must lie in HBM."""
    host_bytes_per_token: int
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, kw_only=True)
class CapacityPlan:
    """Everything for one rank, in bytes, tokens and seconds."""

    settings: PlanSettings
    dtype: str
    num_layers: int
    num_kv_heads: int
    """Of one rank."""
    head_dim: int
    max_positions: int
    max_num_batched_tokens: int
    usable_bytes: int
    weight_bytes: int
    weight_source: str
    activation_bytes: int
    cuda_bytes: int
    kv_bytes: int
    """What is left in HBM for KV."""
    host_bytes: int
    rates: Rates
    rate_source: str
    without_offload: Side
    with_offload: Side | None

    @property
    def fits(self) -> bool:
        """Whether the asked context fits in one way at least; also false where no context does."""
        sides = [self.without_offload, *([self.with_offload] if self.with_offload else [])]
        return any(side.longest_context >= (self.settings.context or 1) for side in sides)


def make_plan(settings: PlanSettings, info: ModelInfo) -> CapacityPlan:
    """Plan for a model. Raises ConfigError where what was asked contradicts itself or the model."""
    check_settings(settings, info)
    return Planner(settings, info).plan()


class Planner:
    """Sizes and times for one question; everything is per rank."""

    def __init__(self, settings: PlanSettings, info: ModelInfo) -> None:
        """Raises ConfigError where the weights do not fit, or heads cannot be kept hot or grouped as asked."""
        self.settings = settings
        self.shape = info.shape
        self.dtype = info.dtype
        self.element_bytes = ELEMENT_BYTES[info.dtype]
        self.rates = override(
            rates_of(settings.gpu), tflops=settings.tflops, hbm_gbs=settings.hbm_gbs, host_gbs=settings.pcie_gbs
        )
        self.has_prefill_rates = self.element_bytes == 2 or settings.tflops is not None
        self.usable_bytes = int(settings.gpu_memory * settings.gpu_memory_utilization)
        self.weight_bytes, self.weight_source = weights_of_rank(settings, info)
        if self.weight_bytes >= self.usable_bytes:
            raise ConfigError(
                f"the weights take {self.weight_bytes / GIB:.1f} GiB of each GPU, of which "
                f"{self.usable_bytes / GIB:.1f} GiB may be used ({settings.gpu_memory / GIB:.1f} GiB times "
                f"{settings.gpu_memory_utilization}). Use more GPUs (--tensor-parallel-size), larger ones, or "
                "quantized weights."
            )
        self.host_bytes = (settings.host_memory or 0) // settings.tensor_parallel_size
        num_kv_heads = kv_heads_of_rank(self.shape.num_kv_heads, settings.tensor_parallel_size)
        self.all_hot = KVLayout(
            num_kv_heads=num_kv_heads,
            head_dim=self.shape.head_dim,
            element_bytes=self.element_bytes,
            page_size=settings.page_size,
            hot_heads=(num_kv_heads,) * self.shape.num_layers,
            stub_bytes=stub_bytes_of(settings.page_size, self.element_bytes),
        )
        hot_heads = hot_heads_of_rank(settings, self.shape.num_kv_heads, num_kv_heads)
        self.offloaded = self.all_hot.with_hot_heads(hot_heads) if settings.host_memory else None
        check_group(settings, self.offloaded)
        self.step = settings.max_num_batched_tokens or self.choose_step()
        self.kv_bytes = self.kv_bytes_with(self.step)

    def plan(self) -> CapacityPlan:
        """Everything about both ways to hold KV."""
        layouts = [self.all_hot, *([self.offloaded] if self.offloaded else [])]
        contexts = contexts_to_show(self.settings.context, [self.longest(layout) for layout in layouts])
        return CapacityPlan(
            settings=self.settings,
            dtype=self.dtype,
            num_layers=self.shape.num_layers,
            num_kv_heads=self.all_hot.num_kv_heads,
            head_dim=self.shape.head_dim,
            max_positions=self.shape.max_positions,
            max_num_batched_tokens=self.step,
            usable_bytes=self.usable_bytes,
            weight_bytes=self.weight_bytes,
            weight_source=self.weight_source,
            activation_bytes=self.activation_bytes(self.step),
            cuda_bytes=fixed_bytes(self.settings.tensor_parallel_size),
            kv_bytes=self.kv_bytes,
            host_bytes=self.host_bytes,
            rates=self.rates,
            rate_source=rate_source_of(self.settings),
            without_offload=self.side(self.all_hot, contexts),
            with_offload=self.side(self.offloaded, contexts) if self.offloaded else None,
        )

    def activation_bytes(self, step: int) -> int:
        ranks, num_seqs = self.settings.tensor_parallel_size, self.settings.concurrency
        return activation_bytes(self.shape, self.element_bytes, step, num_seqs, ranks)

    def kv_bytes_with(self, step: int) -> int:
        """HBM left for KV, where a step has `step` tokens; negative where even the rest does not fit."""
        rest = self.weight_bytes + self.activation_bytes(step) + fixed_bytes(self.settings.tensor_parallel_size)
        return self.usable_bytes - rest

    def choose_step(self) -> int:
        """The longest of STEP_TOKENS with which the asked context fits, or one page; the shortest where none does."""
        layout = self.offloaded or self.all_hot
        asked = self.settings.context or self.settings.page_size
        fitting = [step for step in STEP_TOKENS if self.sizes(layout, asked, step) is not None]
        return fitting[0] if fitting else STEP_TOKENS[-1]

    def load(self, context: int, step: int) -> Load:
        num_requests = self.settings.concurrency
        return Load(
            context_len=context, num_requests=num_requests, max_num_batched_tokens=step, max_num_seqs=num_requests
        )

    def group_size(self, layout: KVLayout) -> int | None:
        return self.settings.group_size if layout.max_cold_heads else None

    def sizes(self, layout: KVLayout, context: int, step: int, *, is_whole_host: bool = False) -> KVPlan | None:
        """Pools for a context, with as much host memory as its requests need, or with all of it."""
        load, hbm_bytes, host_bytes = self.load(context, step), self.kv_bytes_with(step), self.host_bytes
        if not is_whole_host:
            blocks = needed_blocks(context, self.settings.page_size, self.settings.concurrency)
            host_bytes = min(host_bytes, blocks * layout.cold_block_bytes)
        return plan_kv(layout, load, hbm_bytes, host_bytes, self.group_size(layout))

    def longest(self, layout: KVLayout, host_bytes: int | None = None) -> int:
        """Tokens of the longest context; host_bytes: as if there were so many."""
        host_bytes = self.host_bytes if host_bytes is None else host_bytes
        load, most_len = self.load(1, self.step), self.shape.max_positions
        return longest_context(layout, load, self.kv_bytes, host_bytes, most_len, self.group_size(layout))

    def side(self, layout: KVLayout, contexts: list[int]) -> Side:
        longest = self.longest(layout)
        if longest == self.shape.max_positions:
            limited_by = POSITIONS
        else:
            limited_by = HOST_MEMORY if longest < self.longest(layout, 2 * self.host_bytes) else GPU_MEMORY
        is_asked = self.settings.context is not None
        return Side(
            longest_context=longest,
            limited_by=limited_by,
            hbm_bytes_per_token=layout.hot_token_bytes,
            host_bytes_per_token=layout.cold_token_bytes,
            predictions=tuple(self.predict(layout, each) for each in contexts if is_asked or each <= longest),
        )

    def predict(self, layout: KVLayout, context: int) -> Prediction:
        sizes = self.sizes(layout, context, self.step)
        if sizes is None:
            return Prediction(context=context, fits=False)
        settings = self.settings
        most_blocks = (self.sizes(layout, context, self.step, is_whole_host=True) or sizes).num_blocks
        has_offload = layout.max_cold_heads > 0
        resident_len = context
        if has_offload:
            resident_len = min(sizes.num_slots * settings.page_size // settings.concurrency, context)
        span_len = min(sizes.staging_pages * settings.page_size, context)
        cold_share = layout.cold_token_bytes / (layout.cold_token_bytes + layout.hot_token_bytes)
        first_token_s = waiting_s = None
        if self.has_prefill_rates:
            first_token_s = self.prefill_seconds(layout, context, resident_len, span_len)
            if has_offload:
                waiting_s = first_token_s - self.prefill_seconds(self.all_hot, context, context)
        return Prediction(
            context=context,
            fits=True,
            max_requests=(most_blocks - NULL_BLOCKS) // (needed_blocks(context, settings.page_size) - NULL_BLOCKS),
            hot_heads=layout.hot_heads[0] if has_offload else None,
            num_slots=sizes.num_slots if has_offload else None,
            group_size=sizes.group_size if has_offload else None,
            staging_bytes=sizes.staging_bytes if has_offload else None,
            span_len=span_len if has_offload else None,
            host_bytes=sizes.host_bytes if has_offload else None,
            share_in_hbm=1 - cold_share * (1 - resident_len / context),
            first_token_s=first_token_s,
            waiting_s=waiting_s,
            token_ms=1e3 * self.decode_seconds(layout, context, resident_len),
        )

    def prefill_seconds(self, layout: KVLayout, context: int, resident_len: int, span_len: int = 0) -> float:
        return prefill_seconds(
            self.shape,
            layout,
            self.rates,
            context_len=context,
            chunk_len=self.step,
            resident_len=resident_len,
            bytes_of_weights=self.weight_bytes,
            tensor_parallel_size=self.settings.tensor_parallel_size,
            span_len=span_len,
        )

    def decode_seconds(self, layout: KVLayout, context: int, resident_len: int) -> float:
        ranks = self.settings.tensor_parallel_size
        return decode_seconds(
            self.shape,
            layout,
            self.rates,
            context_len=context,
            num_requests=self.settings.concurrency,
            resident_len=resident_len,
            bytes_per_param=self.weight_bytes * ranks / self.shape.stored_params,
            tensor_parallel_size=ranks,
        )


def check_settings(settings: PlanSettings, info: ModelInfo) -> None:
    """Refuse numbers out of range, and what the model rules out. Raises ConfigError."""
    shape, ranks = info.shape, settings.tensor_parallel_size
    named = {
        "--gpu-memory": settings.gpu_memory,
        "--host-memory": settings.host_memory,
        "--context": settings.context,
        "--concurrency": settings.concurrency,
        "--tensor-parallel-size": ranks,
        "--max-num-batched-tokens": settings.max_num_batched_tokens,
        "--weights": settings.weights,
        "--tflops": settings.tflops,
        "--hbm-gbs": settings.hbm_gbs,
        "--pcie-gbs": settings.pcie_gbs,
    }
    for name, value in named.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}; it must be above 0.")
    if not 0 < settings.gpu_memory_utilization <= 1:
        raise ConfigError(f"--gpu-memory-utilization is {settings.gpu_memory_utilization}; allowed: above 0, up to 1.")
    if settings.gpu not in GPUS:
        raise ConfigError(
            f"--gpu is {settings.gpu!r}; known: {', '.join(GPUS)}. For another one take the nearest, and give "
            "--gpu-memory, --tflops, --hbm-gbs and --pcie-gbs."
        )
    if settings.host_memory is None:
        asked = {"--hot-heads": settings.hot_heads or None, "--group-size": settings.group_size}
        for name in (name for name, value in asked.items() if value is not None):
            raise ConfigError(f"{name} is about offload, and without --host-memory there is none. Give --host-memory.")
    if settings.context is not None and settings.context > shape.max_positions:
        raise ConfigError(
            f"--context is {settings.context:,} tokens, and the positions of {settings.model} end at "
            f"{shape.max_positions:,}. Ask for less, or change the model's positions as for vLLM, such as "
            f"--hf-overrides '{{\"max_position_embeddings\": {settings.context}}}'."
        )
    if shape.num_heads % ranks or (shape.num_kv_heads % ranks and ranks % shape.num_kv_heads):
        raise ConfigError(
            f"--tensor-parallel-size is {ranks}, which does not divide {shape.num_heads} query heads and "
            f"{shape.num_kv_heads} KV heads evenly. Use a divisor of both."
        )


def hot_heads_of_rank(settings: PlanSettings, num_kv_heads: int, num_rank_heads: int) -> int:
    """Hot KV heads in a layer of one rank. Raises ConfigError where they cannot be shared out.

    num_kv_heads, num_rank_heads: of a layer of the model, and of one rank.
    """
    hot, least = settings.hot_heads, num_kv_heads // num_rank_heads
    if not 0 <= hot < num_kv_heads or hot % least:
        multiples = "" if least == 1 else f", in multiples of {least}, so that every rank has as many"
        raise ConfigError(
            f"--hot-heads is {hot}; allowed: 0 to {num_kv_heads - least} of the {num_kv_heads} KV heads of a layer"
            f"{multiples}. With all of them hot there is no offload."
        )
    return hot // least


def check_group(settings: PlanSettings, layout: KVLayout | None) -> None:
    """Refuse a group that the cold heads of a rank rule out. Raises ConfigError."""
    if layout is not None and settings.group_size not in (None, *group_sizes(layout)):
        sizes = ", ".join(map(str, group_sizes(layout)))
        raise ConfigError(f"--group-size is {settings.group_size}; allowed for these heads: {sizes}, or auto.")


def weights_of_rank(settings: PlanSettings, info: ModelInfo) -> tuple[int, str]:
    """Bytes of weights in one rank, and where the number comes from. Raises ConfigError where nothing says it."""
    ranks = settings.tensor_parallel_size
    if settings.weights is not None:
        return settings.weights // ranks, "as given"
    if info.file_bytes is not None:
        return info.file_bytes // ranks, "from the model's files"
    if info.layer_bits is None:
        raise ConfigError(
            f"{settings.model} is quantized by {info.quantization}, whose size is not known here. Give --weights, the "
            "GiB of its files."
        )
    source = "counted from the configuration" + (f", {info.quantization}" if info.quantization else "")
    return weight_bytes(info.shape, ELEMENT_BYTES[info.dtype], info.layer_bits, ranks), source


def rate_source_of(settings: PlanSettings) -> str:
    """How much the rates are worth, in words."""
    measured = "measured"
    if settings.gpu != MEASURED_GPU:
        measured = f"the vendor's figures, times the shares of them that an {MEASURED_GPU} reaches"
    given = {"--tflops": settings.tflops, "--hbm-gbs": settings.hbm_gbs, "--pcie-gbs": settings.pcie_gbs}
    names = [name for name, value in given.items() if value is not None]
    return measured if not names else f"{measured}, but for {', '.join(names)}"


def contexts_to_show(asked: int | None, longest: list[int]) -> list[int]:
    """The asked context, or the ladder as far as either way of holding KV goes, with the ends of both."""
    if asked is not None:
        return [asked]
    shown = {context for context in LADDER if context <= max(longest)} | {each for each in longest if each}
    return sorted(shown)
