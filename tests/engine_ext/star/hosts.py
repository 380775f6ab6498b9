"""Hosts of Star Attention as threads, each with a builder, a paged cache and one layer; no vLLM engine."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext import impl, layers, metadata, requests
from farspan.engine_ext.config import Prefill, parse_config
from farspan.engine_ext.offload.cache import ColdCache
from farspan.engine_ext.offload.pool import make_host_pool
from farspan.engine_ext.passes import StepMetadata
from farspan.engine_ext.plan import OffloadSizes
from farspan.engine_ext.star import steps
from farspan.engine_ext.star.exchange import PartialResult, unpacked
from farspan.engine_ext.star.shard import StarShard
from farspan.engine_ext.string import Rotation
from farspan.kernels.reference import attend_logits
from farspan.scheduler.residency import Residency, Scheduled

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
LAYER = "model.layers.0.self_attn.attn"
INV_FREQ = 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
CPU = torch.device("cpu")
running: Any = threading.local()
"""The forward context of each host's thread."""


@dataclass(frozen=True)
class Layout:
    """How a context is cut; all lengths in tokens."""

    num_hosts: int
    context_len: int
    block_len: int
    anchor_len: int
    counts: tuple[int, ...]
    """Blocks of each host."""

    def shards(self, name: str = "r") -> list[StarShard]:
        first, made = 0, []
        query_host = max(rank for rank, count in enumerate(self.counts) if count)
        for rank, count in enumerate(self.counts):
            made.append(
                StarShard(
                    name=name,
                    context_len=self.context_len,
                    block_len=self.block_len,
                    anchor_len=self.anchor_len,
                    first_block=first,
                    num_blocks=count,
                    num_hosts=self.num_hosts,
                    query_host=query_host,
                    rank=rank,
                )
            )
            first += count
        return made


@dataclass(frozen=True)
class Tokens:
    """Queries, keys and values of a whole prompt, context and query, before any rotation; float64."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def make_tokens(num_tokens: int, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(num_tokens, count, HEAD_DIM, generator=generator, dtype=torch.float64)

    return Tokens(heads(NUM_HEADS), heads(NUM_KV_HEADS), heads(NUM_KV_HEADS))


def rotate(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate [num_tokens, num_heads, head_dim] to their positions, as neox models do."""
    angle = positions[:, None, None] * INV_FREQ.double()
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def star_mask(layout: Layout, num_tokens: int) -> torch.Tensor:
    """[num_tokens, num_tokens] bool: what each token of a prompt sees, from the definition alone."""
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for query in range(num_tokens):
        for key in range(query + 1):
            same_block = query // layout.block_len == key // layout.block_len
            is_context = query < layout.context_len
            mask[query, key] = not is_context or same_block or key < layout.anchor_len
    return mask


def oracle(tokens: Tokens, mask: torch.Tensor) -> torch.Tensor:
    """Attention over a whole matrix of true positions, [num_tokens, num_heads, head_dim] float64."""
    positions = torch.arange(len(tokens.query))
    query, key = rotate(tokens.query, positions), rotate(tokens.key, positions)
    key = key.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query, key) * HEAD_DIM**-0.5
    return attend_logits(logits, tokens.value, mask)[0]


class Meeting:
    """Exchanges of threads; those of one host wait for all others."""

    def __init__(self, num_hosts: int) -> None:
        self.barrier = threading.Barrier(num_hosts, timeout=20)
        self.given: list[Any] = [None] * num_hosts

    def meet(self, rank: int, what: Any) -> list[Any]:
        self.given[rank] = what
        self.barrier.wait()
        everyone = list(self.given)
        self.barrier.wait()
        return everyone

    def exchange(self, rank: int) -> Any:
        def agree(digest: bytes, number: int = 0) -> list[int]:
            assert len(digest) <= 7
            digests, numbers = zip(*self.meet(rank, (digest, number)), strict=True)
            assert len(set(digests)) == 1
            return list(numbers)

        def gather(mine: PartialResult) -> tuple[torch.Tensor, torch.Tensor]:
            return unpacked(torch.stack(self.meet(rank, mine.buffer)), mine.out)

        def gather_pages(pages: torch.Tensor) -> torch.Tensor:
            return torch.cat(self.meet(rank, pages.clone()))

        def send_pages(pages: torch.Tensor) -> None:
            pages.copy_(self.meet(rank, pages.clone())[0])

        return SimpleNamespace(
            agree=agree, gather=gather, gather_pages=gather_pages, send_pages=send_pages, num_bytes=0,
            num_hosts=len(self.given), rank=rank, anchor_of=None,
        )  # fmt: skip


def make_cold_cache(page_size: int, num_blocks: int, hot_heads: int, num_slots: int) -> tuple[ColdCache, Residency]:
    """The cold heads of the layer, staged one at a time, and who decides where their pages lie."""
    sizes = OffloadSizes(
        num_blocks=num_blocks,
        num_slots=num_slots,
        page_size=page_size,
        page_bytes=0,
        group_size=1,
        staging_pages=num_blocks,
    )
    shape = page_size, 2 * HEAD_DIM
    host = make_host_pool([NUM_KV_HEADS - hot_heads], (num_blocks, *shape), torch.float32, register=False)
    slots = torch.full((NUM_KV_HEADS - hot_heads, num_slots, *shape), torch.nan)
    return ColdCache({LAYER: hot_heads}, NUM_KV_HEADS, sizes, host, slots, 8, 1024, 4096), Residency(sizes)


class Source:
    """The requests of a host's step."""

    def __init__(self, prefill: Prefill) -> None:
        self.prefill = prefill
        self.step: list[StarShard | None] = []
        self.cold: ColdCache | None = None
        self.missed: list[bool] = []
        """Of each request of the step, whether pages of cold heads are in no slot."""

    def prefills(self, common: Any) -> list[Prefill]:
        return [self.prefill] * len(self.step)

    def prompt_lens(self, common: Any) -> list[int | None]:
        return [None] * len(self.step)

    def shards(self, common: Any) -> list[StarShard | None]:
        return self.step

    def missing(self, common: Any) -> list[bool]:
        return self.missed

    def cold_cache(self) -> ColdCache | None:
        return self.cold

    def plan(self) -> None:
        """No plan."""

    def model(self) -> None:
        """No model."""


class Host:
    """One host: vLLM's part (positions, pages, batches) played by hand around our builder and launches."""

    def __init__(
        self,
        page_size: int,
        num_pages: int,
        options: Any,
        monkeypatch: pytest.MonkeyPatch,
        *,
        graphs: bool = False,
        hot_heads: int = NUM_KV_HEADS,
        num_slots: int = 0,
    ) -> None:
        """hot_heads: the others are cold, with so many slots."""
        options = {"star": {"graphs": graphs}, **(options or {})}
        self.source = Source(parse_config(options).prefill)
        monkeypatch.setattr(requests, "_make_source", lambda vllm_config: self.source)
        rotary = SimpleNamespace(rotation_of_layer=lambda *arguments: Rotation(INV_FREQ, True))
        monkeypatch.setattr(layers, "rotary_source", lambda: rotary)
        monkeypatch.setattr(impl, "get_forward_context", lambda: running)
        vllm_config = SimpleNamespace(
            additional_config={"farspan": options},
            parallel_config=SimpleNamespace(worker_extension_cls=""),
            speculative_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            model_config=SimpleNamespace(max_model_len=4096, get_num_attention_heads=lambda parallel: NUM_HEADS),
        )
        spec = SimpleNamespace(num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32, block_size=page_size)
        self.cold, self.residency = None, None
        if hot_heads < NUM_KV_HEADS:
            self.cold, self.residency = make_cold_cache(page_size, num_pages, hot_heads, num_slots)
            self.source.cold = self.cold
        self.builder = metadata.FarspanMetadataBuilder(spec, [LAYER], vllm_config, CPU)
        self.page_size = page_size
        self.pages = torch.full((num_pages, hot_heads, page_size, 2 * HEAD_DIM), torch.nan)
        # Block 0 is no request's.
        self.free = (1 + torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(1))).tolist()
        self.tables: dict[int, list[int]] = {}

    def step(self, chunks: list[tuple[int, StarShard | None, Tokens, int]], padding: int = 0) -> list[torch.Tensor]:
        """Compute chunks [(request, shard, the request's tokens, computed tokens before the chunk)].

        padding: requests behind them without a token, as vLLM fills up a graph's batch.

        The tokens of a chunk end where the request's tokens given here end. Returns the outputs of each.
        """
        lens = [len(tokens.query) for _, _, tokens, _ in chunks]
        starts = torch.tensor([0, *(length - first for length, (*_, first) in zip(lens, chunks, strict=True))])
        starts = starts.cumsum(0).int()
        scheduled = []
        for (request, *_, first), length in zip(chunks, lens, strict=True):
            table = self.tables.setdefault(request, [])
            known = len(table)
            while len(table) * self.page_size < length:
                table.append(self.free.pop())
            scheduled.append(Scheduled(str(request), first, length - first, table[known:]))
        width = max(map(len, self.tables.values()))
        rows = [self.tables[request] for request, *_ in chunks]
        table = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int32)
        common = SimpleNamespace(
            causal=True,
            num_reqs=len(chunks),
            max_query_len=int(starts.diff().max()),
            max_seq_len=max(lens),
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lens, dtype=torch.int32),
            block_table_tensor=table,
        )
        slots = []
        for row, length, (*_, first) in zip(rows, lens, chunks, strict=True):
            slots += [row[at // self.page_size] * self.page_size + at % self.page_size for at in range(first, length)]
        common.slot_mapping = torch.tensor(slots)
        self.source.step = [shard for _, shard, _, _ in chunks]
        if self.residency is not None and self.cold is not None:
            plan = self.residency.plan(scheduled, [], lambda block: True)
            self.cold.follow(plan)
            self.source.missed = [each.req_id in plan.missing for each in scheduled]
        if padding:
            starts_padded = torch.cat([starts, starts[-1:].expand(padding)])
            lens_padded = torch.tensor([*lens, *[0] * padding], dtype=torch.int32)
            common.num_reqs += padding
            common.query_start_loc = common.query_start_loc_cpu = starts_padded
            common.seq_lens = common.seq_lens_cpu_upper_bound = lens_padded
            common.block_table_tensor = torch.cat([table, table[:1].expand(padding, -1)])
            self.source.step += [chunks[0][1]] * padding
        step = self.builder.build(0, common)
        query = torch.cat([local(tokens.query, first) for _, _, tokens, first in chunks])
        key = torch.cat([local(tokens.key, first) for _, _, tokens, first in chunks])
        value = torch.cat([tokens.value[first:].float() for _, _, tokens, first in chunks])
        if padding:
            query, key, value = (torch.cat([each, each[:1].expand(padding, -1, -1)]) for each in (query, key, value))
            slots += [-1] * padding
        out = self.attend(step, query, key, value, torch.tensor(slots))
        return list(out[: int(starts[-1])].split(starts.diff().tolist()))

    def attend(
        self, step: StepMetadata, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """What vLLM asks of the layer in a step."""
        layer: Any = object.__new__(impl.FarspanImpl)
        layer.num_heads, layer.num_kv_heads, layer.head_size = NUM_HEADS, NUM_KV_HEADS, HEAD_DIM
        layer.scale, layer.config = HEAD_DIM**-0.5, self.builder.config
        running.attn_metadata = {LAYER: step}
        name, out = SimpleNamespace(layer_name=LAYER), torch.full_like(query, torch.nan)
        layer.do_kv_cache_update(name, key, value, self.pages, slots)
        return layer.forward(name, query, key, value, self.pages, step, out)


def local(heads: torch.Tensor, first: int) -> torch.Tensor:
    """The rows from `first` on as a model hands them to attention: rotated by their place in the request."""
    return rotate(heads[first:], torch.arange(first, len(heads))).float()


def shard_tokens(tokens: Tokens, shard: StarShard) -> Tokens:
    """The prompt of one host, query included: anchor, own blocks, query."""
    own = range(shard.own_start, shard.own_start + shard.own_len)
    places = torch.tensor([*range(shard.copied_len), *own, *range(shard.context_len, len(tokens.query))])
    return at_places(tokens, places)


def at_places(tokens: Tokens, places: torch.Tensor) -> Tokens:
    return Tokens(tokens.query[places], tokens.key[places], tokens.value[places])


def first_of(tokens: Tokens, count: int) -> Tokens:
    return Tokens(tokens.query[:count], tokens.key[:count], tokens.value[:count])


_host = threading.local()


def run_hosts(num_hosts: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` of all hosts at the same time."""

    def work_as(rank: int) -> Any:
        _host.rank = rank
        return work(rank)

    with ThreadPoolExecutor(num_hosts) as pool:
        return list(pool.map(work_as, range(num_hosts)))


def meet_in_threads(num_hosts: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let builders find the threads' exchanges, which it returns, instead of a process group."""
    meeting = Meeting(num_hosts)
    made = [meeting.exchange(rank) for rank in range(num_hosts)]
    for module in (metadata, steps):
        monkeypatch.setattr(module, "exchange_of", lambda hosts, rank: made[rank] if hosts > 1 else None)
    monkeypatch.setattr(metadata, "current_exchange", lambda: made[getattr(_host, "rank", 0)])
    monkeypatch.setattr(steps, "current", lambda: made[getattr(_host, "rank", 0)])
    return made
