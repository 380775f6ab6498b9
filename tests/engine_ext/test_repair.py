"""A flex chunk as the engine computes it: sparse, measured, and the heads below gamma computed again."""

from typing import Any

import msgspec
import pytest
import torch
from farspan.engine_ext.config import DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.launch import attend
from farspan.engine_ext.metadata import PassMaker
from farspan.engine_ext.passes import LayerContext
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.engine_ext.selection.repair import COVERAGE_SLACK, heads_below_gamma
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.batch import KVView, PagedBatch
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

    def run(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, Any]]]:
        """Output of the sparse launch, output after repair, and the statistics by head."""
        prefill = FlexPrefill(gamma=GAMMA, min_budget=0, **options)
        selector = FlexSelector(SelectionStats(self.query.shape[1], CPU))
        out = self.attend(prefill, selector)
        assert selector.stats is not None
        sparse = self.attend(msgspec.structs.replace(prefill, coverage_rows=0), FlexSelector())
        return sparse, out, selector.stats.rows()


@pytest.mark.parametrize("options", [{}, {"share_kv_group": True}], ids=["per-head", "shared"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["gqa1", "gqa2", "gqa4"])
def test_the_head_and_request_that_fail_are_repaired(num_kv_heads: int, options: dict[str, bool]) -> None:
    # Of request 0's queries, [600, 1500), those before 1100 have no key at distance 1100; in request 1 no query has.
    layer = Layer([(900, 1500), (65, 420)], [90, 1100, 90, 90], num_kv_heads)
    sparse, out, rows = layer.run(**options)
    dense = layer.dense()
    torch.testing.assert_close(out[:900, 1], dense[:900, 1], atol=1e-5, rtol=1e-5)
    assert float((sparse - dense)[:500, 1].abs().mean()) > 5 * float((out - dense)[:500].abs().mean())
    others = torch.ones(len(out), 4, dtype=torch.bool)
    others[:900, 1] = False
    assert torch.equal(out[others], sparse[others])
    assert [row["repaired"] for row in rows] == [0.0, 0.5, 0.0, 0.0]
    assert all(row["coverage"] >= GAMMA for row in rows)
    assert rows[1]["density"] > 0.8


def test_under_shifted_positions() -> None:
    layer = Layer([(900, 1500)], [90, 1100], 1, shift=1400)
    _, out, rows = layer.run()
    assert [row["repaired"] for row in rows] == [0.0, 1.0]
    torch.testing.assert_close(out[:, 1], layer.dense()[:, 1], atol=1e-5, rtol=1e-5)


def test_max_budget_overrides_gamma() -> None:
    layer = Layer([(900, 1500)], [90, 1100], 1)
    sparse, out, rows = layer.run(max_budget=256)
    assert torch.equal(sparse, layer.run(max_budget=256, coverage_rows=0)[1])
    assert torch.equal(sparse, out)
    assert rows[1]["coverage"] < GAMMA - 0.05
    assert rows[1]["repaired"] == 0.0


@pytest.mark.parametrize("query_len", [1, 2, 3])
def test_chunks_of_a_few_queries(query_len: int) -> None:
    layer = Layer([(query_len, 1300), (query_len, query_len)], [90, 1100], 1)
    sparse, out, rows = layer.run()
    assert [row["repaired"] for row in rows] == [0.0, 0.0]
    assert torch.equal(sparse, out)
    torch.testing.assert_close(out, layer.dense(), atol=0.1, rtol=0.1)


def test_heads_below_gamma_are_those_of_one_request() -> None:
    """A head can keep gamma in one request and not in another."""
    coverage = torch.tensor([[[1.0, 0.6], [0.9, 0.9]], [[0.92, 0.9], [0.1, 0.7]]])
    assert heads_below_gamma(coverage, 0.9).tolist() == [[True, False], [False, True]]
    assert not heads_below_gamma(torch.full((1, 1, 4), 0.9 - COVERAGE_SLACK + 1e-4), 0.9).any()


def test_the_same_prompt_has_the_same_result() -> None:
    """Attention mass that a head lost in one prompt changes nothing in the next prompt."""
    layer, other = Layer([(900, 1500)], [90, 1100], 1), Layer([(900, 1500)], [1100, 90], 1)
    prefill, selector = FlexPrefill(gamma=GAMMA, min_budget=0), FlexSelector()
    first = layer.attend(prefill, selector)
    for _ in range(3):
        other.attend(prefill, selector)
    assert torch.equal(layer.attend(prefill, selector), first)
