"""Selection by sampled rows: the Triton kernels against PyTorch, and the promise that chunks change nothing."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from farspan.kernels.flex import oracle, tile_rows, tile_rows_reference
from farspan.kernels.flex.spans import SpanRule, Spans, make_spans
from farspan.kernels.flex.types import NO_LIMIT, Budget, TileSelection
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.tiles import PrefillTiles, make_prefill_tiles
from farspan.kernels.tuning import TileRowsConfig

from tests.kernels.helpers import Inputs, make_batch
from tests.kernels.string_helpers import inverse_frequencies, make_shift


@dataclass(frozen=True)
class Case:
    """A varlen batch; every request prefills."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    group: int = 2
    head_dim: int = 32
    page_size: int = 16
    block_size: int = 64
    span_tiles: int = 2
    rows: int = 16
    gamma: float = 0.9
    min_blocks: int = 1
    max_blocks: int = NO_LIMIT
    share: bool = False
    layout: str = "lbhnc"
    shift: int = 0
    """Distance S from which positions are shifted; 0 for ordinary positions."""
    block_m: int = 64

    @property
    def name(self) -> str:
        lens = "+".join(f"{q}of{kv}" for q, kv in zip(self.query_lens, self.seq_lens, strict=True))
        span = f"span{self.span_tiles}x{self.block_size}-rows{self.rows}"
        extras = f"-g{self.gamma}-min{self.min_blocks}{'-shared' if self.share else ''}"
        extras += f"-string{self.shift}" if self.shift else ""
        return f"{lens}-gqa{self.group}-d{self.head_dim}-page{self.page_size}-{span}{extras}"

    @property
    def rule(self) -> SpanRule:
        return SpanRule(self.span_tiles * self.block_size, self.rows)

    @property
    def budget(self) -> Budget:
        return Budget(self.gamma, 0.0, self.min_blocks, self.max_blocks, self.group if self.share else 1)


CASES = [
    Case((1,), (1,)),
    Case((128,), (128,), group=1),
    Case((600,), (600,), group=1),
    Case((500,), (500,), span_tiles=1, min_blocks=4),
    Case((321,), (640,), page_size=64, share=True),
    Case((65, 300, 2), (65, 777, 130), group=1, min_blocks=3),
    Case((200,), (500,), group=7, span_tiles=1, page_size=32),
    Case((200, 129), (400, 257), group=8, share=True, min_blocks=5),
    Case((600,), (1100,), page_size=128, block_size=128, head_dim=64, rows=32, span_tiles=4, group=1),
    Case((300,), (700,), max_blocks=4),
    Case((300,), (700,), gamma=0.99, max_blocks=5, share=True, layout="lbnhc"),
    Case((300,), (700,), gamma=1.0),
    Case((300,), (557,), head_dim=80, page_size=48),
    Case((400,), (1000,), shift=200, head_dim=64),
    Case((400,), (1000,), shift=64, head_dim=64, span_tiles=1, group=1, block_m=32),
]


def batch_of(case: Case, device: torch.device) -> Inputs:
    return make_batch(
        case.query_lens,
        case.seq_lens,
        num_heads=2 * case.group,
        num_kv_heads=2,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=dtype_on(device),
        device=device,
        layout=case.layout,
        sharpness=3.0,
    )


def turn_of(case: Case, device: torch.device | str) -> Turn | None:
    if not case.shift:
        return None
    return make_shift(inverse_frequencies(case.head_dim // 2), case.shift, 16, True, torch.device(device))


def spans_of(batch: Inputs, tiles: PrefillTiles, rule: SpanRule) -> Spans:
    return make_spans(batch.query_start_loc.tolist(), batch.seq_lens.tolist(), tiles, rule)


def on_cpu(batch: Inputs) -> Inputs:
    return replace(batch, **{name: each.cpu() for name, each in vars(batch).items() if isinstance(each, torch.Tensor)})


def lists_of(selection: TileSelection) -> list[list[list[int]]]:
    ids, counts = selection.block_lists.block_ids.tolist(), selection.block_lists.block_counts.tolist()
    return [
        [row[:count] for row, count in zip(head_ids, head_counts, strict=True)]
        for head_ids, head_counts in zip(ids, counts, strict=True)
    ]


def select_on_cpu(batch: Inputs, case: Case) -> TileSelection:
    batch = on_cpu(batch)
    tiles = batch.tiles(case.block_size)
    return tile_rows_reference.tile_row_lists(
        batch.query, batch.kv, batch.paged, tiles, spans_of(batch, tiles, case.rule), batch.scale, case.budget,
        turn=turn_of(case, "cpu"),
    )  # fmt: skip


def select_on_device(batch: Inputs, case: Case) -> TileSelection:
    tiles = batch.tiles(case.block_size)
    config = TileRowsConfig(case.block_m, 4, 2, use_tma=False)
    return tile_rows.tile_row_lists(
        batch.query, batch.kv, batch.paged, tiles, spans_of(batch, tiles, case.rule), batch.scale, case.budget,
        turn=turn_of(case, batch.query.device), config=config,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lists_equal_reference_and_keep_their_contract(case: Case, device: torch.device) -> None:
    batch = batch_of(case, device)
    ours, expected = select_on_device(batch, case), select_on_cpu(batch, case)
    assert lists_of(ours) == lists_of(expected)
    real = spans_of(batch, batch.tiles(case.block_size), case.rule).span_request.cpu() >= 0
    torch.testing.assert_close(ours.kept.cpu()[:, real], expected.kept[:, real], atol=1e-5, rtol=1e-5)
    if case.max_blocks == NO_LIMIT:
        assert bool((expected.kept[:, real] >= case.gamma - 1e-6).all())
    for head in lists_of(ours):
        for block, ids in zip(batch.tiles(case.block_size).tile_block.tolist(), head, strict=True):
            own = range(block // case.span_tiles * case.span_tiles, block + 1)
            assert ids == sorted(set(ids))
            assert ids[0] == 0
            assert ids[-len(own) :] == list(own)
            assert len(ids) >= min(case.min_blocks, block + 1)
            if case.gamma == 1 and case.max_blocks == NO_LIMIT:
                assert len(ids) == block + 1


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[8], CASES[13]], ids=lambda case: case.name)
def test_log_sums_are_those_of_every_block(case: Case, num_splits: int, device: torch.device) -> None:
    batch = batch_of(case, device)
    tiles = batch.tiles(case.block_size)
    spans = spans_of(batch, tiles, case.rule)
    num_heads = batch.query.shape[1]
    out = torch.full((num_heads, spans.num_spans, tiles.max_kv_blocks, case.rows), float("nan"), device=device)
    key_pages, _ = batch.kv.split()
    turn = turn_of(case, device)
    launch = tile_rows.LogSumsLaunch(
        batch.query, key_pages, batch.paged, spans, tiles.max_kv_blocks, case.block_size, turn,
        TileRowsConfig(64, 4, 2, use_tma=False), num_splits,
    )  # fmt: skip
    launch(batch.query, key_pages, batch.scale, turn, out)
    batch = on_cpu(batch)
    one_block = {block: log_sums_of(batch, case, spans, block) for block in range(tiles.max_kv_blocks)}
    for span, (request, index) in enumerate(zip(spans.span_request.tolist(), spans.span_index.tolist(), strict=True)):
        if request < 0:
            assert bool(out[:, span].isnan().all())
            continue
        for block in range((index + 1) * case.span_tiles):
            torch.testing.assert_close(out[:, span, block].cpu(), one_block[block][:, span], atol=2e-3, rtol=1e-4)


def log_sums_of(batch: Inputs, case: Case, spans: Spans, block: int) -> torch.Tensor:
    """[num_q_heads, num_spans, rows] base-2 log-sums over one block, of a batch of one request on the CPU."""
    place = spans.rule.places(spans.span_index.cpu())
    rows = batch.query[(spans.span_row.cpu()[:, None] + place).clamp_max(len(batch.query) - 1)].double()
    position = spans.span_index.cpu()[:, None] * case.rule.span_len + place
    key = oracle.gather_kv(batch.kv_cache, batch.block_table[0], int(batch.seq_lens[0]), torch.float64)[0]
    key_pos = torch.arange(len(key))[block * case.block_size : (block + 1) * case.block_size]
    key = key[key_pos].repeat_interleave(case.group, 1)
    logits = torch.einsum("srhd,khd->hsrk", rows, key)
    turn = turn_of(case, "cpu")
    if turn is not None:
        from farspan.kernels.rotary_turn import apply_turn

        turned = torch.einsum("srhd,khd->hsrk", apply_turn(rows, turn), key)
        logits = torch.where(key_pos < turn.bounds(position)[..., None], turned, logits)
    logits = logits.masked_fill(key_pos > position[..., None], float("-inf")) * (batch.scale / 0.6931471805599453)
    return torch.logsumexp(logits * 0.6931471805599453, -1).float() / 0.6931471805599453


def test_a_choice_takes_what_half_of_the_rows_ask_of_the_other_half() -> None:
    """Masses by hand: span 2 of two tiles, so blocks 0 to 3 are the past and 4 and 5 its own."""
    tiles = make_prefill_tiles([0, 128], [384], 64, torch.device("cpu"))
    spans = make_spans([0, 128], [384], tiles, SpanRule(128, 16))
    unit = tile_rows_reference.MASS_UNIT // 200

    def chosen(even: list[int], odd: list[int], gamma: float, **limits: int) -> list[list[int]]:
        mass = torch.zeros(1, spans.num_spans, 2, 6, dtype=torch.int32)
        mass[0, 0] = torch.tensor([even, odd], dtype=torch.int32) * unit
        budget = Budget(gamma, 0.0, limits.get("least", 0), limits.get("most", NO_LIMIT))
        return lists_of(tile_rows_reference.choose(mass, spans, tiles, budget))[0]

    same = [50, 20, 6, 4, 10, 10]
    assert chosen(same, same, 0.69) == [[0, 4], [0, 4, 5]]
    assert chosen(same, same, 0.71) == [[0, 1, 4], [0, 1, 4, 5]]
    assert chosen(same, same, 0.93) == [[0, 1, 2, 4], [0, 1, 2, 4, 5]]
    assert chosen(same, same, 1.0) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert chosen(same, same, 0.1, least=4) == [[0, 1, 2, 4], [0, 1, 2, 4, 5]]
    assert chosen(same, same, 1.0, most=4) == [[0, 1, 4], [0, 1, 4, 5]]
    # Of equals the nearest are listed.
    even, odd = [40, 12, 9, 19, 10, 10], [40, 9, 12, 19, 10, 10]
    assert chosen(even, odd, 0.75) == [[0, 3, 4], [0, 3, 4, 5]]
    assert chosen([41, 11, 10, 18, 10, 10], [41, 10, 11, 18, 10, 10], 0.9) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    # Blocks 0, 4 and 5 have 60; 1 and 2 have 28 of one half each, and nothing of the other: 1 alone would keep 74.
    assert chosen([60, 28, 2, 0, 5, 5], [60, 2, 28, 0, 5, 5], 0.72) == [[0, 1, 2, 4], [0, 1, 2, 4, 5]]
    # What no half knows of the other keeps everything that has any mass.
    assert chosen([60, 30, 0, 0, 5, 5], [60, 0, 30, 0, 5, 5], 0.72) == [[0, 1, 2, 4], [0, 1, 2, 4, 5]]


def dtype_on(device: torch.device) -> torch.dtype:
    # A GPU multiplies float32 slowly, and float16 operands into exact float32 products.
    return torch.float16 if device.type == "cuda" else torch.float32


def requests_on(device: torch.device, query_lens: list[int], seq_lens: list[int]) -> Inputs:
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    return make_batch(query_lens, seq_lens, **shape, sharpness=3.0, device=device, dtype=dtype_on(device))  # type: ignore[arg-type]


def chunk_of(prompt: Inputs, first: int, end: int) -> Inputs:
    """Tokens [first, end) of a prompt of one request as the chunk of a step, after what came before."""
    return replace(
        prompt,
        query=prompt.query[first:end],
        seq_lens=torch.tensor([end], dtype=torch.int32, device=prompt.query.device),
        query_start_loc=torch.tensor([0, end - first], dtype=torch.int32, device=prompt.query.device),
    )


CUTS = {
    "one": (0, 800),
    "two": (0, 420, 800),
    "nine": (0, 128, 130, 300, 301, 512, 600, 640, 799, 800),
    "prefix-hit": (256, 800),
    "ragged-prefix-hit": (260, 800),
}


@pytest.mark.parametrize("select", [select_on_cpu, select_on_device], ids=["pytorch", "triton"])
@pytest.mark.parametrize("name", CUTS)
def test_the_same_blocks_however_a_prompt_is_cut(name: str, select, device) -> None:  # type: ignore[no-untyped-def]
    """Tiles of spans that a chunk holds in part read everything; all others what they read in one chunk."""
    case = Case((800,), (800,), gamma=0.8)
    prompt = requests_on(device, [800], [800])
    whole = lists_of(select(prompt, case))
    num_chosen = 0
    for first, end in pairwise(CUTS[name]):
        chunk = chunk_of(prompt, first, end)
        lists = lists_of(select(chunk, case))
        for tile, block in enumerate(chunk.tiles(case.block_size).tile_block.tolist()):
            span = block // case.span_tiles
            is_whole = first <= span * case.rule.span_len and (span + 1) * case.rule.span_len <= end
            num_chosen += is_whole
            for head in range(4):
                assert lists[head][tile] == (whole[head][block] if is_whole else list(range(block + 1)))
    assert num_chosen > 1
    assert sum(len(row) for head in whole for row in head) < 4 * 0.9 * 13 * 14 / 2


@pytest.mark.parametrize("select", [select_on_cpu, select_on_device], ids=["pytorch", "triton"])
def test_two_requests_choose_as_each_alone(select, device) -> None:  # type: ignore[no-untyped-def]
    case = Case((300, 400), (700, 400), gamma=0.8)
    both = requests_on(device, list(case.query_lens), list(case.seq_lens))
    together = lists_of(select(both, case))
    first_tile = 0
    for request, (query_len, seq_len) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        start = int(both.query_start_loc[request])
        alone = replace(
            both,
            query=both.query[start : start + query_len],
            seq_lens=torch.tensor([seq_len], dtype=torch.int32, device=device),
            query_start_loc=torch.tensor([0, query_len], dtype=torch.int32, device=device),
            block_table=both.block_table[request : request + 1],
        )
        lists = lists_of(select(alone, case))
        num_tiles = len(lists[0])
        assert lists == [head[first_tile : first_tile + num_tiles] for head in together]
        first_tile += num_tiles


def test_heads_beyond_the_room_for_log_sums_come_after_the_others(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    case = Case((300,), (700,))
    batch = batch_of(case, device)
    whole = lists_of(select_on_device(batch, case))
    monkeypatch.setattr(tile_rows, "TILE_ROWS_MAX_BYTES", 1)
    assert lists_of(select_on_device(batch, case)) == whole


def test_a_chunk_may_begin_before_the_end_of_its_keys() -> None:
    """Positions come from the spans, so that `first_pos` needs no say here."""
    case = Case((300,), (700,))
    batch = batch_of(case, torch.device("cpu"))
    tiles = batch.tiles(case.block_size)
    spans = spans_of(batch, tiles, case.rule)
    paged = replace(batch.paged, first_pos=torch.tensor([400], dtype=torch.int32))
    lists = [
        lists_of(
            tile_rows_reference.tile_row_lists(batch.query, batch.kv, each, tiles, spans, batch.scale, case.budget)
        )
        for each in (batch.paged, paged)
    ]
    assert lists[0] == lists[1]


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("span_len", [128, 512])
def test_sampled_places(span_len: int, rows: int) -> None:
    places = SpanRule(span_len, rows).places(torch.arange(50))
    part = span_len // rows
    assert torch.equal(places // part, torch.arange(rows).expand(50, -1))
    # Every place within a part is taken by some rows.
    assert len((places % part).unique()) == part
