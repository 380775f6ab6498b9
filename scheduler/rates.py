"""How fast GPUs are, and from that the time that a prompt and a token take, with KV in HBM and in host memory.

Predictions are for one prompt alone in exact attention, and for a step in which every request makes one token. They
leave out communication between tensor-parallel ranks and time in which the host decides.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from farspan.scheduler.capacity import KVLayout
from farspan.scheduler.footprint import ModelShape


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one GPU reaches in 16 bits."""

    linear_tflops: float
    """Linear layers of long chunks."""
    attention_tflops: float
    """Exact prefill."""
    weight_gbs: float
    """Reading weights in decode, with everything around it: GB (10**9 bytes) a second."""
    kv_gbs: float
    """Reading KV from HBM in decode."""
    host_gbs: float
    """Reading KV from host memory, by the kernels themselves; writing is as fast, and both go at once."""


COMBINED_BYTES = 10
"""What a span costs, as bytes of HBM for each number of a chunk's attention and each span but the first: what the sums
move. H200, 2026-11: in spans of 94K first tokens at 128K and 400K were no later than with buffers for all of the
context (benchmarks/data/offload_prefill.csv, run 20261128-5d3fa3)."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU by the vendor's figures."""

    memory_mib: int
    """As nvidia-smi shows it."""
    peak_tflops: float
    """16 bits, accumulated in float32, without structured sparsity."""
    hbm_gbs: float
    link_gbs: float
    """One direction of PCIe with 16 lanes."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What connects the hosts."""

    name: str
    gbs: float
    """GB (10**9 bytes) a second that a host receives and, at the same time, sends."""
    latency_us: float
    """Of a small collective of two hosts, in a CUDA graph; every doubling of the hosts adds one."""
    is_measured: bool = False


LINKS = {
    # Two H100 of one machine, NCCL, 2026-11: 268 MB from one to the other in 0.74 ms; an all-gather of one token's
    # (out, LSE) in 9 to 13 us inside a graph.
    "nvlink": Link(name="NVLink", gbs=362, latency_us=11, is_measured=True),
    # Nine tenths of the line rate, and the latencies that such networks are known for with and without RDMA.
    "400Gb": Link(name="400 Gb/s", gbs=45, latency_us=20),
    "25Gb": Link(name="25 Gb/s", gbs=2.8, latency_us=60),
}


GPUS = {
    "H100": Gpu(memory_mib=81559, peak_tflops=989, hbm_gbs=3350, link_gbs=63),
    "H200": Gpu(memory_mib=143771, peak_tflops=989, hbm_gbs=4800, link_gbs=63),
    "B200": Gpu(memory_mib=183359, peak_tflops=2250, hbm_gbs=8000, link_gbs=63),
    "A100": Gpu(memory_mib=81920, peak_tflops=312, hbm_gbs=2039, link_gbs=31.5),
    "L40S": Gpu(memory_mib=46068, peak_tflops=362, hbm_gbs=864, link_gbs=31.5),
    "L4": Gpu(memory_mib=23034, peak_tflops=121, hbm_gbs=300, link_gbs=31.5),
    "RTX4090": Gpu(memory_mib=24564, peak_tflops=165, hbm_gbs=1008, link_gbs=31.5),
    "RTX3090": Gpu(memory_mib=24576, peak_tflops=71, hbm_gbs=936, link_gbs=31.5),
}
MEASURED_GPU = "H100"
# One H100 80GB HBM3 (SXM), 2026-11: an 8B Llama shape in vLLM 0.32 with FlashAttention 3, 128K tokens in 10.5 s, of
# which the linear layers take 3.0 and attention 7.5; 6.72 ms a token after 1K tokens and 12.15 after 128K
# (benchmarks/data/ttft.csv, tpot.csv, run 20261122-e2c7e0); flash-decoding at 2.75 to 3.03 TB/s (decode.csv); one layer
# of 128K tokens and 8 heads read from pinned host pages in 10.8 ms, where one large copy runs at 53.8 GB/s.
MEASURED = Rates(linear_tflops=610, attention_tflops=600, weight_gbs=2250, kv_gbs=2900, host_gbs=49.8)


def rates_of(gpu: str) -> Rates:
    """Of a GPU in the table: measured, or else the vendor's figures times the share that the measured one reaches."""
    vendor, measured = GPUS[gpu], GPUS[MEASURED_GPU]
    compute = vendor.peak_tflops / measured.peak_tflops
    hbm = vendor.hbm_gbs / measured.hbm_gbs
    return Rates(
        linear_tflops=MEASURED.linear_tflops * compute,
        attention_tflops=MEASURED.attention_tflops * compute,
        weight_gbs=MEASURED.weight_gbs * hbm,
        kv_gbs=MEASURED.kv_gbs * hbm,
        host_gbs=MEASURED.host_gbs * vendor.link_gbs / measured.link_gbs,
    )


def override(
    rates: Rates, *, tflops: float | None = None, hbm_gbs: float | None = None, host_gbs: float | None = None
) -> Rates:
    """Rates that the user knows better. hbm_gbs: for KV; weights follow in proportion."""
    if tflops is not None:
        rates = replace(rates, linear_tflops=tflops, attention_tflops=tflops)
    if hbm_gbs is not None:
        rates = replace(rates, kv_gbs=hbm_gbs, weight_gbs=hbm_gbs * MEASURED.weight_gbs / MEASURED.kv_gbs)
    if host_gbs is not None:
        rates = replace(rates, host_gbs=host_gbs)
    return rates


def attention_seconds(
    shape: ModelShape, rates: Rates, start: int, chunk_len: int, tensor_parallel_size: int = 1
) -> float:
    """Exact attention of a chunk at positions [start, start + chunk_len), all layers, with its keys in HBM."""
    pairs = chunk_len * start + chunk_len * (chunk_len + 1) / 2
    heads = shape.num_heads * shape.num_layers / tensor_parallel_size
    return 4 * heads * shape.head_dim * pairs / (rates.attention_tflops * 1e12)


def host_seconds(num_bytes: float, rates: Rates) -> float:
    """Reading from, or writing to, host memory."""
    return num_bytes / (rates.host_gbs * 1e9)


def kv_seconds(layout: KVLayout, rates: Rates, context_len: int, resident_len: int) -> float:
    """Reading one request's KV in decode: hot heads and resident tokens from HBM, the others from host memory.

    resident_len: tokens whose cold pages lie in slots. Both memories one after the other, which is an upper bound.
    """
    resident_len = min(resident_len, context_len)
    hbm_bytes = context_len * layout.hot_token_bytes + resident_len * layout.cold_token_bytes
    cold_bytes = (context_len - resident_len) * layout.cold_token_bytes
    return hbm_bytes / (rates.kv_gbs * 1e9) + host_seconds(cold_bytes, rates)


def chunks_of(context_len: int, chunk_len: int) -> Iterator[tuple[int, int]]:
    """Start and length of every chunk of a prompt; as in an engine with offload, the short one comes second."""
    lengths = [chunk_len] * (context_len // chunk_len)
    if context_len % chunk_len:
        lengths.insert(1, context_len % chunk_len)
    yield from zip(accumulate(lengths, initial=0), lengths, strict=False)


def prefill_seconds(
    shape: ModelShape,
    layout: KVLayout,
    rates: Rates,
    *,
    context_len: int,
    chunk_len: int,
    resident_len: int,
    bytes_of_weights: float,
    tensor_parallel_size: int = 1,
    span_len: int = 0,
) -> float:
    """A prompt alone, until its first token.

    resident_len: tokens whose cold pages have slots, the chunk's own included. What does not lie there is gathered
    beside attention and costs what it takes longer; so does writing the chunk's cold pages to the host.
    bytes_of_weights: of a rank, which every chunk reads. span_len: tokens of the context that are gathered at once; 0
    for all. Results of spans are combined after each of them.
    """
    least_linear = bytes_of_weights / (rates.weight_gbs * 1e9)
    flops = 2 * shape.active_params / tensor_parallel_size
    seconds = 0.0
    for start, length in chunks_of(context_len, chunk_len):
        linear = max(flops * length / (rates.linear_tflops * 1e12), least_linear)
        attention = attention_seconds(shape, rates, start, length, tensor_parallel_size)
        missing_len = min(max(start + length - resident_len, 0), start)
        gather = host_seconds(missing_len * layout.cold_token_bytes, rates)
        write = host_seconds(length * layout.cold_token_bytes, rates)
        if missing_len > 0 and span_len > 0:
            num_combined = -(-(start + length) // span_len) - 1
            numbers = length * shape.num_heads * shape.head_dim * shape.num_layers / tensor_parallel_size
            attention += num_combined * numbers * COMBINED_BYTES / (rates.kv_gbs * 1e9)
        seconds += max(linear + max(attention, gather), write)
    return seconds


def decode_seconds(
    shape: ModelShape,
    layout: KVLayout,
    rates: Rates,
    *,
    context_len: int,
    num_requests: int,
    resident_len: int,
    bytes_per_param: float,
    tensor_parallel_size: int = 1,
) -> float:
    """One step: a token for each of `num_requests` requests with `context_len` tokens.

    resident_len: tokens of each request whose cold pages have slots. bytes_per_param: on average over the weights.
    """
    read = shape.read_params(num_requests) * bytes_per_param / tensor_parallel_size / (rates.weight_gbs * 1e9)
    flops = 2 * (shape.active_params + shape.head_params) * num_requests / tensor_parallel_size
    linear = max(read, flops / (rates.linear_tflops * 1e12))
    return linear + num_requests * kv_seconds(layout, rates, context_len, resident_len)
