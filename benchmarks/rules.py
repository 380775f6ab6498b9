"""What the parts of the rule of sampled rows are worth: drift of a real checkpoint's log-probs under variants of it.

Every layer of the checkpoint, run by transformers, attends to the blocks that a rule chooses, through our kernels; the
pieces of the texts are those of `real`, one chunk each, and each piece is read by every rule, so that rules differ by
less than their standard errors say. Coverage is that of all rows after the first 1,024, on the first piece. The rules
are written in PyTorch; `as-built` is the engine's own selection, whose rows must equal those of the default.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from farspan.evaluation.audit import AuditSettings, cut_prompts, read_tokens
from farspan.evaluation.audit_results import BLOCK_TOKENS, change_of
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.cpu_attention import cpu_attention
from farspan.kernels.flex.spans import MASS_UNIT, SpanRule, make_spans
from farspan.kernels.flex.tile_rows_reference import blocks_by_halves
from farspan.kernels.flex.tile_rows_reference import tile_row_lists as tile_row_lists_cpu
from farspan.kernels.tiles import BlockLists, PrefillTiles, make_prefill_tiles

from benchmarks.real import Inputs, on_texts
from benchmarks.record import BenchmarkError, Recorder

NAME = "rules"
NEEDS_GPU = False
BLOCK = 128
FIRST_COUNTED = 1024
"""Rows before this one read everything."""
COVERAGE_PIECES = 1
ROWS_AT_ONCE = 2048
"""Whose masses are in memory at a time where coverage is counted."""
IMPLEMENTATION = "farspan_rules"


@dataclass(frozen=True)
class Rule:
    """How past blocks are chosen for a span of queries; the first block and the span's own are always read."""

    name: str
    span_len: int = 256
    rows: int = 16
    """Sampled rows of a span; 0 for all of them."""
    places: str = "parts"
    """`parts`: one row in each part, as built; `even`: evenly spaced, shifted from span to span."""
    lost: float = 0.5
    """Share of 1 - gamma that the sampled rows may lose."""
    gamma: float = 0.95
    min_blocks: int = 8
    previous: int = 0
    """Blocks before the span that are always read."""
    row_floor: float = 0.0
    """Share of its own mass that each sampled row keeps."""
    halves: bool = False
    """Whether the margin is what each half of the sampled rows loses by the other half's choice: see `by_halves`."""
    rank: str = "mean"
    """Blocks are taken by the rows' mean mass, or by its root mean square."""
    is_built: bool = False
    """Whether the engine's own selection chooses; the fields above do not count then."""


RULES = (
    Rule("as-built", is_built=True),
    Rule("16of128-lost1-even", 128, 16, "even", 1.0),
    Rule("16of128-lost1", 128, 16, lost=1.0),
    Rule("all128-lost1", 128, 0, lost=1.0),
    Rule("16of256-lost.5"),
    Rule("16of256-lost.5-even", places="even"),
    Rule("16of256-lost.4", lost=0.4),
    Rule("16of256-lost.3", lost=0.3),
    Rule("16of128-lost.7", 128, 16, lost=0.7),
    Rule("32of256-lost.7", rows=32, lost=0.7),
    Rule("32of256-lost.5", rows=32),
    Rule("16of128-lost.5", 128, 16),
    Rule("16of256-lost.5-rows.8", row_floor=0.8),
    Rule("16of256-lost.5-rows.9", row_floor=0.9),
    Rule("16of256-lost.5-rms", rank="rms"),
    Rule("16of256-lost.5-min16", min_blocks=16),
    Rule("16of256-lost1", lost=1.0),
    Rule("32of256-lost1", rows=32, lost=1.0),
    Rule("64of256-lost1", rows=64, lost=1.0),
    Rule("64of256-lost.5", rows=64),
    Rule("16of256-lost.2", lost=0.2),
    Rule("16of256-lost.5-previous1", previous=1),
    Rule("16of128-halves", 128, 16, lost=1.0, halves=True),
    Rule("16of128-halves.8", 128, 16, lost=0.8, halves=True),
    Rule("16of128-halves.6", 128, 16, lost=0.6, halves=True),
    Rule("16of256-halves", lost=1.0, halves=True),
    Rule("16of256-halves.6", lost=0.6, halves=True),
    Rule("all256-lost.5", rows=0),
    Rule("all128-lost.5", 128, 0),
)


@dataclass
class Found:
    """What one rule did so far."""

    densities: list[torch.Tensor]
    """By forward pass, [num_layers, num_heads]."""
    coverage: list[torch.Tensor]
    log_probs: list[torch.Tensor]
    greedy: list[torch.Tensor]


def cases(dry_run: bool) -> list[int]:
    """List the lengths of the dry run; those of a checkpoint come from the command line."""
    return [1537] if dry_run else []


def run(recorder: Recorder, inputs: Inputs | None) -> None:
    names = ("as-built", "16of256-lost.5", "16of128-lost1-even", "all128-lost1", "16of256-lost.5-rows.9")
    on_texts(recorder, inputs, measure, lengths=tuple(cases(True)), prompts=1, questions=0, variants=names)


def measure(recorder: Recorder, inputs: Inputs) -> None:
    unknown = set(inputs.variants) - {each.name for each in RULES}
    if unknown:
        raise BenchmarkError(f"variants {sorted(unknown)}; known are {', '.join(each.name for each in RULES)}")
    rules = [each for each in RULES if not inputs.variants or each.name in inputs.variants]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = Reader(inputs.model, device)
    settings = AuditSettings(inputs.model, inputs.texts, inputs.lengths, (0.95,), Path(), prompts=inputs.prompts)
    prompts = cut_prompts(settings, read_tokens(inputs.model, inputs.texts))
    for length, mine in prompts.items():
        case = f"n{length}-{inputs.label}-{'fp32' if device.type == 'cpu' else 'bf16'}"
        dense = Found([], [], [], [])
        found = {rule.name: Found([], [], [], []) for rule in rules}
        started = time.monotonic()
        for piece, tokens in enumerate(mine):
            if inputs.seconds is not None and piece and time.monotonic() - started > inputs.seconds:
                recorder.note(f"{case}: stopped after {piece} of {len(mine)} pieces: {inputs.seconds:.0f} s are over")
                break
            reader.read(tokens, None, dense, with_coverage=False)
            for rule in rules:
                reader.read(tokens, rule, found[rule.name], with_coverage=piece < COVERAGE_PIECES)
        for rule in rules:
            record(recorder, case, rule, dense, found[rule.name])


def record(recorder: Recorder, case: str, rule: Rule, dense: Found, sparse: Found) -> None:
    changed = [before != after for before, after in zip(dense.greedy, sparse.greedy, strict=True)]
    change = change_of(dense.log_probs, sparse.log_probs, changed)
    density = torch.stack(sparse.densities).mean(0).flatten()
    coverage = torch.stack(sparse.coverage).mean(0).flatten()
    recorder.add(NAME, case, rule.name, "density", "fraction", density.tolist())
    recorder.add(NAME, case, rule.name, "coverage_min", "fraction", [float(coverage.min())])
    recorder.add(NAME, case, rule.name, "drift", "nats/token", [change.drift])
    recorder.add(NAME, case, rule.name, "drift_error", "nats/token", [change.drift_error])
    target, floor = rule.gamma - 0.01, rule.gamma - 0.05
    for limit, metric in ((target, "below_gamma_0.01"), (floor, "below_gamma_0.05")):
        share = float((coverage < limit).double().mean())
        recorder.add(NAME, case, rule.name, metric, "fraction", [share])
    recorder.note(
        f"{case} {rule.name}: {len(sparse.log_probs)} pieces, density {float(density.mean()):.3f}, drift "
        f"{change.drift:+.4f} ± {change.drift_error:.4f} (means over {BLOCK_TOKENS} tokens), changed "
        f"{change.changed:.2%}, coverage {float(coverage.mean()):.4f}, worst {float(coverage.min()):.3f}, "
        f"heads below {target:g}: {float((coverage < target).double().mean()):.2%}, below {floor:g}: "
        f"{float((coverage < floor).double().mean()):.2%}"
    )


class Reader:
    """A checkpoint in transformers whose attention reads what a rule chooses."""

    def __init__(self, model: str, device: torch.device) -> None:
        from farspan.evaluation.evaluate import model_path
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, self.attention)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path(model), dtype=dtype, attn_implementation=IMPLEMENTATION
        ).to(device)  # fmt: skip
        self.device = device
        self.rule: Rule | None = None
        self.with_coverage = False
        self.densities: list[torch.Tensor] = []
        self.coverage: list[torch.Tensor] = []
        self.shared: dict[int, tuple[PagedBatch, PrefillTiles]] = {}

    @torch.no_grad()
    def read(self, tokens: list[int], rule: Rule | None, found: Found, *, with_coverage: bool) -> None:
        """Read one piece by a rule, densely if None, and note in `found` what came of it."""
        self.rule, self.with_coverage = rule, with_coverage
        self.densities.clear()
        self.coverage.clear()
        ids = torch.tensor(tokens, device=self.device)[None]
        hidden = self.model.model(ids, use_cache=False).last_hidden_state[0]
        weight = self.model.get_output_embeddings().weight.float()
        first = len(tokens) // 2
        log_probs, greedy = [], []
        for start in range(first - 1, len(tokens) - 1, 1024):
            end = min(start + 1024, len(tokens) - 1)
            logits = hidden[start:end].float() @ weight.T
            log_probs.append(logits.log_softmax(-1).gather(1, ids[0, start + 1 : end + 1, None])[:, 0])
            greedy.append(logits.argmax(-1))
        found.log_probs.append(torch.cat(log_probs).cpu())
        found.greedy.append(torch.cat(greedy).cpu())
        if rule is not None:
            found.densities.append(torch.stack(self.densities).cpu())
            if with_coverage:
                found.coverage.append(torch.stack(self.coverage).cpu())

    def batch(self, num_tokens: int) -> tuple[PagedBatch, PrefillTiles]:
        if num_tokens not in self.shared:
            pages = -(-num_tokens // BLOCK)
            self.shared[num_tokens] = (
                PagedBatch(
                    torch.tensor([0, num_tokens], dtype=torch.int32, device=self.device),
                    torch.tensor([num_tokens], dtype=torch.int32, device=self.device),
                    torch.arange(pages, dtype=torch.int32, device=self.device)[None],
                    num_tokens,
                    num_tokens,
                ),
                make_prefill_tiles([0, num_tokens], [num_tokens], BLOCK, self.device),
            )
        return self.shared[num_tokens]

    def attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """One layer: query [1, num_heads, num_tokens, head_dim], as transformers hands it."""
        num_tokens, scale = query.shape[2], query.shape[3] ** -0.5
        batch, tiles = self.batch(num_tokens)
        pages = torch.nn.functional.pad(torch.cat([key[0], value[0]], -1), (0, 0, 0, -num_tokens % BLOCK))
        kv = KVView(pages.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous())
        rows = query[0].transpose(0, 1).contiguous()
        lists = None
        if self.rule is not None:
            lists, keep = self.choose(query[0], key[0], rows, kv, batch, tiles, scale)
            self.densities.append(keep.sum((1, 2)) / (tiles.tile_block + 1).sum())
            if self.with_coverage:
                self.coverage.append(coverage_of(query[0], key[0], scale, keep))
        if self.device.type == "cuda":
            from farspan.kernels.prefill import paged_prefill

            out, _lse = paged_prefill(rows, kv, batch, tiles, scale, block_lists=lists)
        else:
            out = torch.empty_like(rows)
            cpu_attention(rows, kv, batch, scale, out=out, tiles=tiles if lists else None, block_lists=lists)
        return out[None], None

    def choose(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        rows: torch.Tensor,
        kv: KVView,
        batch: PagedBatch,
        tiles: PrefillTiles,
        scale: float,
    ) -> tuple[BlockLists, torch.Tensor]:
        """Lists of every tile and head, and the same as [num_heads, num_tiles, num_blocks] bool."""
        assert self.rule is not None
        num_tokens = query.shape[1]
        if not self.rule.is_built:
            keep = kept_blocks(query, key, scale, self.rule)
            return lists_of(keep), keep
        from farspan.engine_ext.config import FlexPrefill
        from farspan.engine_ext.selection.methods import TILE_ROWS_RULE, flex_budget

        select: Callable[..., Any] = tile_row_lists_cpu
        if self.device.type == "cuda":
            from farspan.kernels.flex.tile_rows import tile_row_lists

            select = tile_row_lists
        spans = make_spans([0, num_tokens], [num_tokens], tiles, TILE_ROWS_RULE)
        budget = flex_budget(FlexPrefill(gamma=self.rule.gamma), BLOCK, 1)
        lists = select(rows, kv, batch, tiles, spans, scale, budget).block_lists
        index = torch.arange(lists.block_ids.shape[2], device=self.device)
        ids = torch.where(index < lists.block_counts[..., None], lists.block_ids, lists.block_ids[..., :1]).long()
        keep = torch.zeros_like(ids, dtype=torch.bool).scatter_(2, ids, True)
        return lists, keep


def sampled_places(rule: Rule, num_spans: int, device: torch.device) -> torch.Tensor:
    """Rows of every span: [num_spans, rows] int64, ascending or not."""
    index = torch.arange(num_spans, device=device)
    if rule.rows == 0:
        place = torch.arange(rule.span_len, device=device).expand(num_spans, -1)
    elif rule.places == "parts":
        place = SpanRule(rule.span_len, rule.rows).places(index)
    else:
        part_len = rule.span_len // rule.rows
        even = torch.arange(rule.rows, device=device) * part_len + part_len // 2
        place = (index[:, None] * 37 + even) % rule.span_len
    return index[:, None] * rule.span_len + place


def row_masses(query: torch.Tensor, key: torch.Tensor, places: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention mass of the rows at `places` on every block: [num_heads, len(places), num_blocks] float32.

    query: [num_heads, num_tokens, head_dim]; key: [num_kv_heads, num_tokens, head_dim].
    """
    group, num_tokens = query.shape[0] // key.shape[0], key.shape[1]
    position = torch.arange(num_tokens, device=key.device)
    masses = []
    for kv_head in range(key.shape[0]):
        rows = query[kv_head * group : (kv_head + 1) * group, places].float()
        logits = rows @ key[kv_head].float().T * scale
        weights = logits.masked_fill_(position > places[:, None], float("-inf")).softmax(-1)
        weights = torch.nn.functional.pad(weights, (0, -num_tokens % BLOCK))
        masses.append(weights.unflatten(-1, (-1, BLOCK)).sum(-1))
    return torch.cat(masses)


def kept_blocks(query: torch.Tensor, key: torch.Tensor, scale: float, rule: Rule) -> torch.Tensor:
    """The blocks that each tile reads, [num_heads, num_tiles, num_blocks] bool; tiles in no whole span read all."""
    num_tokens = query.shape[1]
    num_tiles = -(-num_tokens // BLOCK)
    num_spans, tiles_per_span = num_tokens // rule.span_len, rule.span_len // BLOCK
    places = sampled_places(rule, num_spans, query.device)
    by_row = row_masses(query, key, places.flatten(), scale).unflatten(1, places.shape)
    mean = by_row.mean(2)
    block = torch.arange(num_tiles, device=query.device)
    first_own = torch.arange(num_spans, device=query.device)[:, None] * tiles_per_span
    is_past = block < first_own
    is_forced = is_past & ((block == 0) | (block >= first_own - rule.previous))
    is_free = is_past & ~is_forced
    is_held = is_forced | ((block >= first_own) & (block < first_own + tiles_per_span))
    score = mean if rule.rank == "mean" else by_row.square().mean(2)
    order = torch.where(is_free, score, -1.0).argsort(dim=-1, descending=True, stable=True)
    wanted = needed(mean, is_held, is_free, order, 1 - (1 - rule.gamma) * rule.lost)
    if rule.halves:
        even, odd = by_row[:, :, 0::2].mean(2), by_row[:, :, 1::2].mean(2)
        wanted = by_halves(even, odd, is_held, is_free, 1 - (1 - rule.gamma) * rule.lost)
    if rule.row_floor > 0:
        held, free, by_rank = (
            each.expand_as(by_row) for each in (is_held[:, None], is_free[:, None], order[:, :, None])
        )
        wanted = torch.maximum(wanted, needed(by_row, held, free, by_rank, rule.row_floor).amax(2))
    wanted = torch.maximum(wanted, rule.min_blocks - 1 - is_forced.sum(-1)).clamp_min(0)
    chosen = torch.zeros_like(mean, dtype=torch.bool).scatter_(2, order, block < wanted[..., None]) & is_free
    past = (chosen | is_forced).repeat_interleave(tiles_per_span, 1)
    own = (block // tiles_per_span == block[:, None] // tiles_per_span) & (block <= block[:, None])
    keep = (block <= block[:, None]).expand(len(query), -1, -1).clone()
    keep[:, : past.shape[1]] = past | own[: past.shape[1]]
    return keep


def needed(
    mass: torch.Tensor, is_held: torch.Tensor, is_free: torch.Tensor, order: torch.Tensor, share: float
) -> torch.Tensor:
    """How many blocks in this order it takes, with those held, to keep `share` of the mass."""
    held = torch.where(is_held, mass, 0.0).sum(-1)
    reached = torch.where(is_free, mass, 0.0).gather(-1, order).cumsum(-1) + held[..., None]
    short = (reached < share - 1e-6).sum(-1) + 1
    return torch.where(held >= share - 1e-6, 0, short)


def by_halves(
    even: torch.Tensor, odd: torch.Tensor, is_held: torch.Tensor, is_free: torch.Tensor, share: float
) -> torch.Tensor:
    """How many free blocks it takes for each half of the rows to keep, on average, `share` of its mass by the other's
    choice: [num_heads, num_spans], as the engine's reference counts them.

    even, odd: [num_heads, num_spans, num_blocks], mean masses.
    """
    held = torch.where(is_held, even + odd, 0.0).sum(-1) / 2
    needed = ((share - held) * MASS_UNIT).ceil().long()
    even, odd = ((torch.where(is_free, each, 0.0) * (MASS_UNIT / 2) + 0.5).long() for each in (even, odd))
    return blocks_by_halves(even, odd, needed)


def lists_of(keep: torch.Tensor) -> BlockLists:
    """[num_heads, num_tiles, num_blocks] bool as lists."""
    index = torch.arange(keep.shape[2], device=keep.device)
    ids = torch.where(keep, index, keep.shape[2]).sort(2).values.clamp_(max=keep.shape[2] - 1)
    return BlockLists(ids.int(), keep.sum(2).int())


def coverage_of(query: torch.Tensor, key: torch.Tensor, scale: float, keep: torch.Tensor) -> torch.Tensor:
    """Mean share of their mass that the rows of each head keep, those before FIRST_COUNTED left out: [num_heads]."""
    group, num_tokens = query.shape[0] // key.shape[0], query.shape[1]
    places = torch.arange(FIRST_COUNTED, num_tokens, device=query.device)
    found = []
    for kv_head in range(key.shape[0]):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        kept = torch.zeros(group, device=query.device)
        for some in places.split(ROWS_AT_ONCE):
            mass = row_masses(query[heads], key[kv_head : kv_head + 1], some, scale)
            kept += (mass * keep[heads, some // BLOCK]).sum((1, 2))
        found.append(kept / len(places))
    return torch.cat(found)
