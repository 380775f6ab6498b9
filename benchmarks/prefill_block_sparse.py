"""Static block-sparse attention: tables 12, 18 and 21 and figure 6 of FlashAttention's appendix E, measured again.

Batch 16, 8 heads of 64, float16, bidirectional, forward, with and without padding (tables 12 and 18), and 12 heads of
128, causal (figure 6). Lengths 128 to 65536. Every row of blocks reads the same number of blocks at every length, so
the density is proportional to 1 / length and the time to the length, as in the paper: in 7 of 8 heads the block itself
and its two neighbours, in 1 of 8 the block itself and the first one. With blocks of 128 that is 0.56 % at 65536 tokens.
The butterfly pattern, whose rows have log2 of the number of blocks, is timed too. Inputs are random: the times are
those of kernels at a stated density and say nothing about quality. The variant `torch` is attention written in plain
PyTorch, at the lengths for which its memory suffices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from farspan.kernels import BlockLists, attention, attention_tiles, static_block_lists

from benchmarks import peers
from benchmarks.gate import relative_error
from benchmarks.inputs import DTYPE_NAMES, default_device
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.timing import graph_of, time_interleaved

NAME = "prefill_block_sparse"
CHOOSES_CASES = True
BLOCK_SIZE = 128
LENGTHS = [2**k for k in range(7, 17)]
MAX_PADDING = 20  # as in the paper, whose lengths are drawn from [n - 20, n]
Work = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One point of the tables."""

    length: int
    batch: int = 16
    heads: int = 8
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    causal: bool = False
    padded: bool = False

    @property
    def name(self) -> str:
        tail = "-causal" * self.causal + "-padded" * self.padded
        shape = f"hq{self.heads}-hkv{self.heads}-d{self.head_dim}-{DTYPE_NAMES[self.dtype]}"
        return f"n{self.length}-b{self.batch}-{shape}{tail}"


def cases(dry_run: bool) -> list[Case]:
    """Tables 18 and 12 at every length, figure 6 up to 16384."""
    if dry_run:
        tiny: dict[str, Any] = {"batch": 1, "heads": 8, "dtype": torch.float32}
        return [Case(200, **tiny), Case(200, padded=True, **tiny), Case(300, causal=True, **tiny)]
    tables = [Case(length, padded=padded) for length in LENGTHS for padded in (False, True)]
    return tables + [Case(length, heads=12, head_dim=128, causal=True) for length in LENGTHS if length <= 16384]


@dataclass(frozen=True)
class Inputs:
    """Random q, k, v [batch, length, heads, head_dim], and the lengths [batch] int32 or None."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor | None

    @classmethod
    def draw(cls, case: Case) -> "Inputs":
        device = default_device()
        generator = torch.Generator(device).manual_seed(case.length)
        shape = (case.batch, case.length, case.heads, case.head_dim)
        q, k, v = (torch.randn(shape, dtype=case.dtype, device=device, generator=generator) for _ in range(3))
        lengths = None
        if case.padded:
            least = max(case.length - MAX_PADDING, 1)
            lengths = torch.randint(least, case.length + 1, (case.batch,), device=device, generator=generator).int()
        return cls(case, q, k, v, lengths)


def constant_lists(case: Case) -> BlockLists:
    """The block itself and its neighbours (if causal, the one before); in every eighth head itself and the first."""
    windows, sinks = (pattern_lists(case, "sink_local", sink_blocks=s, local_blocks=2 - s) for s in (0, 1))
    width = windows.block_ids.shape[2]
    wide_sinks = torch.zeros_like(windows.block_ids)
    wide_sinks[:, :, : sinks.block_ids.shape[2]] = sinks.block_ids[:, :, :width]
    of_head = [sinks.block_counts if head % 8 == 7 else windows.block_counts for head in range(case.heads)]
    ids = [wide_sinks if head % 8 == 7 else windows.block_ids for head in range(case.heads)]
    return BlockLists(torch.cat(ids), torch.cat(of_head))


def pattern_lists(case: Case, pattern: str, **options: int) -> BlockLists:
    """One list for all heads."""
    tiles = attention_tiles(case.batch, case.length, case.length, BLOCK_SIZE, device=default_device())
    blocks = torch.full((2 * case.batch,), tiles.max_kv_blocks, dtype=torch.int32, device=default_device())
    return static_block_lists(tiles, pattern, causal=case.causal, num_kv_blocks=blocks, **options)


def density(case: Case, lists: BlockLists) -> float:
    """Listed blocks over the blocks that dense attention reads."""
    blocks = -(-case.length // BLOCK_SIZE)
    dense = blocks * (blocks + 1) // 2 if case.causal else blocks * blocks
    return float(lists.block_counts.sum()) / (dense * case.batch * lists.block_counts.shape[0])


def plain_attention(inputs: Inputs) -> Work:
    """Attention written in PyTorch's operations, as in the paper's first row."""
    case = inputs.case
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    position = torch.arange(case.length, device=q.device)
    hidden = None
    if case.causal:
        hidden = position > position[:, None]
    elif inputs.lengths is not None:
        hidden = (position >= inputs.lengths[:, None])[:, None, None, :]

    def run() -> torch.Tensor:
        scores = q @ k.transpose(2, 3) * case.head_dim**-0.5
        if hidden is not None:
            scores.masked_fill_(hidden, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return run


def sdpa_flash(inputs: Inputs) -> Work:
    """PyTorch's flash kernel, which cannot take a padding mask."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))

    def run() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=inputs.case.causal)
        return out.transpose(1, 2)

    return run


def fa3(inputs: Inputs) -> Work:
    """FlashAttention 3 of vLLM, padding removed beforehand; the removal is not timed."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    case, lengths = inputs.case, inputs.lengths
    q, k, v = (tensor.flatten(0, 1) for tensor in (inputs.q, inputs.k, inputs.v))
    ends = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device) * case.length
    kept = None
    if lengths is not None:
        kept = (torch.arange(case.length, device=q.device) < lengths[:, None]).flatten()
        q, k, v = q[kept], k[kept], v[kept]
        ends[1:] = lengths.cumsum(0)

    def run() -> torch.Tensor:
        return flash_attn_varlen_func(
            q=q, k=k, v=v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=case.length, max_seqlen_k=case.length,
            softmax_scale=case.head_dim**-0.5, causal=case.causal, fa_version=3,
        )  # fmt: skip

    if kept is None:
        return lambda: run().view(inputs.q.shape)
    return run


def works_of(inputs: Inputs, lists: dict[str, BlockLists]) -> dict[str, Work]:
    """The calls of all variants, by name."""
    case = inputs.case

    def ours(block_lists: BlockLists | None) -> Work:
        def run() -> torch.Tensor:
            out = attention(
                inputs.q, inputs.k, inputs.v,
                lengths=inputs.lengths, causal=case.causal, block_mask=block_lists, block_size=BLOCK_SIZE,
            )  # fmt: skip
            assert isinstance(out, torch.Tensor)
            return out

        return run

    works = {"farspan": ours(None)} | {name: ours(block_lists) for name, block_lists in lists.items()}
    if peers.has_module("vllm.vllm_flash_attn"):
        works["fa3"] = fa3(inputs)
    if torch.cuda.is_available() and not case.padded:
        works["sdpa"] = sdpa_flash(inputs)
    works["torch"] = plain_attention(inputs)
    return works


def check(inputs: Inputs, out: torch.Tensor, lists: BlockLists | None, name: str) -> float:
    """Compare sampled rows of the first and the last sequence and head with float32.

    Allowed is twice the error of plain PyTorch at the case's dtype. Returns the largest relative error; raises
    BenchmarkError where an error is larger than allowed.
    """
    case, worst = inputs.case, 0.0
    device = inputs.q.device
    position = torch.arange(case.length, device=device)
    tiles = -(-case.length // BLOCK_SIZE)
    for sequence, head in ((0, 0), (case.batch - 1, case.heads - 1)):
        length = case.length if inputs.lengths is None else int(inputs.lengths[sequence])
        rows = torch.tensor(sorted({0, length // 3, length // 2, length - 1}), device=device)
        visible = (position < length).expand(len(rows), -1)
        if case.causal:
            visible = visible & (position <= rows[:, None])
        if lists is not None:
            list_head = head * lists.block_ids.shape[0] // case.heads
            for index, row in enumerate(rows.tolist()):
                tile = sequence * tiles + row // BLOCK_SIZE
                ids = lists.block_ids[list_head, tile, : int(lists.block_counts[list_head, tile])]
                listed = torch.isin(position // BLOCK_SIZE, ids)
                visible = torch.cat([visible[:index], (visible[index] & listed)[None], visible[index + 1 :]])
        results = {}
        for dtype in (torch.float32, case.dtype):
            q, k, v = (x[sequence, :, head].to(dtype) for x in (inputs.q, inputs.k, inputs.v))
            logits = (q[rows] @ k.T).float() * case.head_dim**-0.5
            weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
            results[dtype] = (weights.to(dtype) @ v).float()
        expected = results[torch.float32]
        allowed = 2 * relative_error(results[case.dtype], expected) + 1e-5
        error = relative_error(out[sequence, rows, head], expected)
        if not error <= allowed:
            raise BenchmarkError(f"{case.name} {name}: relative error {error:.2e}, allowed {allowed:.2e}")
        worst = max(worst, error)
    return worst


def peak_memory(work: Work, before: int) -> float:
    """Largest allocation in GiB while `work` runs once, less `before` bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def run(recorder: Recorder) -> None:
    for case in filter(lambda case: recorder.wants(case.name), cases(recorder.dry_run)):
        run_case(recorder, case)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_case(recorder: Recorder, case: Case) -> None:
    """Check, measure and record every variant of one case."""
    on_gpu = torch.cuda.is_available()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    inputs = Inputs.draw(case)
    lists = {"farspan-sparse": constant_lists(case), "farspan-butterfly": pattern_lists(case, "butterfly")}
    for name, block_lists in lists.items():
        recorder.add(NAME, case.name, name, "density", "fraction", [density(case, block_lists)])
    works = works_of(inputs, lists)
    errors = {}
    for name, work in list(works.items()):
        try:
            out = work()
        except torch.OutOfMemoryError:
            recorder.note(f"{case.name}: {name} is out of memory")
            del works[name]
            continue
        except RuntimeError as problem:
            recorder.note(f"{case.name}: {name} left out: {problem}")
            del works[name]
            continue
        if out.shape == inputs.q.shape:
            try:
                errors[name] = check(inputs, out, lists.get(name), name)
            except BenchmarkError as problem:
                if name.startswith("farspan"):
                    raise
                # Plain PyTorch with its scores in float16 loses a little more than the bound at some lengths.
                recorder.note(f"{problem}; timed all the same")
        del out
        # Table 21: inputs and output included. Memory does not depend on the padding.
        if on_gpu and not case.padded:
            recorder.add(NAME, case.name, name, "peak_gpu_memory", "GiB", [peak_memory(work, before)])
    recorder.note(f"{case.name}: relative errors " + ", ".join(f"{name} {error:.0e}" for name, error in errors.items()))
    # A dense call at 65536 tokens takes about a third of a second.
    slow = {32768: 4, 65536: 3}.get(case.length, 20)
    # In graphs, so that fast calls do not measure how fast Python launches them. A graph of plain PyTorch would keep
    # the memory of its scores, so it is captured only for few tokens.
    timed: dict[str, Callable[[], object]] = dict(works)
    for name, work in works.items():
        if name != "torch" or case.length <= 2048:
            try:
                timed[name] = graph_of([work])[0]
            except RuntimeError as problem:
                recorder.note(f"{case.name}: {name} is launched call by call, a graph of it cannot be made: {problem}")
    times = time_interleaved(timed, repeats=20, repeats_of={name: slow for name in timed if name not in lists})
    for name, samples in times.items():
        recorder.add(NAME, case.name, name, "time", "ms", samples)
