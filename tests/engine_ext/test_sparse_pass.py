"""A chunk as an impl computes it: what sparse attention keeps of dense attention, and what is told of it."""

from typing import Any

import pytest
import torch
from farspan.engine_ext.config import DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.launch import attend
from farspan.engine_ext.pass_maker import PassMaker, other_row
from farspan.engine_ext.passes import LayerContext
from farspan.engine_ext.selection.methods import TILE_ROWS_RULE, FlexSelector
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.decode import MAX_DECODE_REQUESTS
from farspan.kernels.rotary_turn import make_string_turn

CPU = torch.device("cpu")
HEAD_DIM, PAGE = 64, 128
GAMMA = 0.9
NUM_PAGES = 16


def codes(num_tokens: int) -> torch.Tensor:
    """[num_tokens, HEAD_DIM] nearly orthogonal unit vectors, one per position."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(num_tokens, HEAD_DIM, generator=generator), dim=-1)


class Layer:
    """Requests whose keys are the codes of their positions. Each head looks for the key at its own distance."""

    def __init__(
        self, chunks: list[tuple[int, int]], distances: list[int], num_kv_heads: int, shift: int | None = None
    ) -> None:
        """chunks: (query_len, seq_len) per request; distances: per query head."""
        key = codes(2048)
        pages_of = [-(-seq_len // PAGE) for _, seq_len in chunks]
        self.cache = torch.randn(sum(pages_of), num_kv_heads, PAGE, 2 * HEAD_DIM)
        table = torch.zeros(len(chunks), max(pages_of), dtype=torch.int32)
        queries, page = [], 0
        for request, (query_len, seq_len) in enumerate(chunks):
            table[request, : pages_of[request]] = torch.arange(page, page + pages_of[request])
            rows = key[: pages_of[request] * PAGE].unflatten(0, (-1, PAGE))
            self.cache[page : page + pages_of[request], :, :, :HEAD_DIM] = rows[:, None]
            page += pages_of[request]
            position = torch.arange(seq_len - query_len, seq_len)
            # Where no key is at its distance yet, a head's query is zero.
            wanted = [
                torch.where((position >= distance)[:, None], key[position - distance] * 120, 0.0)
                for distance in distances
            ]
            queries.append(torch.stack(wanted, dim=1))
        self.query = torch.cat(queries)
        starts = torch.tensor([0] + [query_len for query_len, _ in chunks]).cumsum(0).int()
        seq_lens = [seq_len for _, seq_len in chunks]
        self.starts, self.seq_lens = starts.tolist(), seq_lens
        self.batch = PagedBatch(
            starts,
            torch.tensor(seq_lens, dtype=torch.int32),
            table,
            max_query_len=max(query_len for query_len, _ in chunks),
            max_kv_len=max(seq_lens),
        )
        self.scale = HEAD_DIM**-0.5
        self.turn = None
        if shift is not None:
            inv_freq = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
            self.turn = make_string_turn(inv_freq, shift, 16, is_neox=True, device=CPU)
        self.maker = PassMaker(num_kv_heads, "cpu", 1, None, shift is not None, CPU)

    def attend(self, prefill: Prefill, selector: FlexSelector | None) -> torch.Tensor:
        """Output of the engine's pass, [num_tokens, num_q_heads, HEAD_DIM]."""
        each = self.maker.prefill(prefill, self.batch, self.starts, self.seq_lens, 0, turns=self.turn is not None)
        out = torch.full_like(self.query, float("nan"))
        attend(each, self.query, KVView(self.cache), LayerContext(0, None, self.turn, selector), self.scale, out)
        return out

    def dense(self) -> torch.Tensor:
        """Exact attention, [num_tokens, num_q_heads, HEAD_DIM]."""
        return self.attend(DensePrefill(), None)

    def run(self, **options: Any) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Out of the sparse pass and the statistics by head."""
        prefill = FlexPrefill(gamma=GAMMA, min_budget=0, **options)
        selector = FlexSelector(SelectionStats(self.query.shape[1], CPU))
        out = self.attend(prefill, selector)
        assert selector.stats is not None
        assert torch.equal(self.attend(prefill, FlexSelector()), out)
        return out, selector.stats.rows()


@pytest.mark.parametrize("options", [{}, {"share_kv_group": True}], ids=["per-head", "shared"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["gqa1", "gqa2", "gqa4"])
def test_every_tile_keeps_gamma(num_kv_heads: int, options: dict[str, bool]) -> None:
    # Of request 0's queries, [512, 2048), those before 1100 have no key 1100 back yet. Request 1 is too short for one.
    layer = Layer([(1536, 2048), (65, 420)], [90, 1100, 90, 90], num_kv_heads)
    out, rows = layer.run(**options)
    dense = layer.dense()
    torch.testing.assert_close(out[1536:], dense[1536:], atol=1e-5, rtol=1e-5)
    assert float((out - dense).abs().mean()) < 0.05 * float(dense.abs().mean())
    assert all(row["coverage_min"] >= GAMMA for row in rows)
    assert all(row["density"] < 0.8 for row in rows if row["head"] != 1 and not options)
    # The paper's rule looks at the last queries alone.
    out, rows = layer.run(selection="flexprefill", coverage_rows=16, **options)
    assert float((out - dense)[:500, 1].abs().mean()) > 0.3 * float(dense[:500, 1].abs().mean())
    assert rows[1]["coverage_min"] < GAMMA - 0.1


def test_other_rows_are_measured_where_statistics_ask_for_it() -> None:
    layer = Layer([(1300, 1900)], [90, 1100], 1)
    _, by_choice = layer.run()
    _, by_others = layer.run(coverage_rows=8)
    assert [row["measured_rows"] for row in by_choice] == [0, 0]
    assert [row["measured_rows"] for row in by_others] == [8, 8]
    for row, other in zip(by_choice, by_others, strict=True):
        assert row["density"] == other["density"]
        assert other["coverage"] > GAMMA - 0.05
        assert row["coverage"] != other["coverage"]


def test_a_chunk_of_one_token_measures_that_token() -> None:
    last_of_a_span = TILE_ROWS_RULE.span_len - 1
    for first_pos in range(last_of_a_span + 1):
        assert other_row(FlexPrefill(min_budget=0), first_pos, 0, first_pos + 1) == (0, False)


def test_under_shifted_positions() -> None:
    layer = Layer([(1300, 1900)], [90, 1100], 1, shift=1400)
    out, rows = layer.run()
    dense = layer.dense()
    assert float((out - dense).abs().mean()) < 0.05 * float(dense.abs().mean())
    assert all(row["coverage_min"] >= GAMMA for row in rows)


def test_max_budget_overrides_gamma() -> None:
    layer = Layer([(1024, 2048)], [90, 1100], 1)
    _, rows = layer.run(max_budget=384)
    # Of 9 to 16 causal blocks a tile's list has at most 3.
    assert all(row["density"] <= 8 * 3 / sum(range(9, 17)) for row in rows)
    assert rows[1]["coverage_min"] < GAMMA


@pytest.mark.parametrize("query_len", [1, 2, 3, 120])
def test_tiles_of_no_whole_span_are_exact(query_len: int) -> None:
    layer = Layer([(query_len, 1300), (query_len, query_len)], [90, 1100], 1)
    out, _ = layer.run()
    dense = layer.dense()
    torch.testing.assert_close(out, dense, atol=1e-4, rtol=1e-4)


def test_the_same_prompt_has_the_same_result() -> None:
    """Attention mass that a head lost in one prompt changes nothing in the next prompt."""
    layer, other = Layer([(900, 1500)], [90, 1100], 1), Layer([(900, 1500)], [1100, 90], 1)
    prefill, selector = FlexPrefill(gamma=GAMMA, min_budget=0), FlexSelector()
    first = layer.attend(prefill, selector)
    for _ in range(3):
        other.attend(prefill, selector)
    assert torch.equal(layer.attend(prefill, selector), first)


@pytest.mark.parametrize("selection", ["tile_rows", "flexprefill"])
@pytest.mark.parametrize(("first", "end"), [(0, 2048), (1300, 1900), (1948, 2000)])
def test_measured_rows_did_not_choose_and_could_lose_something(selection: str, first: int, end: int) -> None:
    prefill = FlexPrefill(selection=selection, min_budget=1024)  # type: ignore[arg-type]
    layer = Layer([(end - first, end)], [90, 1100], 1)
    rows = layer.maker.sample(layer.batch, layer.starts, layer.seq_lens, 64, prefill)
    assert rows.has_choice is not None
    positions = rows.batch.kv_lens - 1
    assert torch.equal(positions - first, rows.rows)
    counted = positions[rows.has_choice].tolist()
    assert all(1024 <= position < end for position in counted)
    if selection == "flexprefill":
        assert all(position < end - 128 for position in counted)
        assert bool(counted) == (end - first > 128)
        return
    length = TILE_ROWS_RULE.span_len
    chosen = {
        span * length + int(place)
        for span in range(end // length)
        for place in TILE_ROWS_RULE.places(torch.tensor(span))
    }
    assert not chosen & set(counted)
    # Tiles of spans that the chunk cuts read everything.
    whole = range(-(-first // length) * length, end // length * length)
    assert all(position in whole for position in counted)
    assert bool(counted) == (len(whole) > 0)


def test_sampled_rows_of_many_requests_fit_into_one_launch() -> None:
    """VLLM warms up with as many requests as an engine takes."""
    layer = Layer([(1, 1)] * 1000, [0], 1)
    rows = layer.maker.sample(layer.batch, layer.starts, layer.seq_lens, 256, FlexPrefill())
    assert len(rows.rows) == 65 * 1000 <= MAX_DECODE_REQUESTS
