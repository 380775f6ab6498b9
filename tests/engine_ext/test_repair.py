"""A chunk as an impl computes it: sparse, measured, and its short heads computed again."""

import pytest
import torch
from farspan.engine_ext.config import FlexPrefill
from farspan.engine_ext.dispatch import CpuLauncher
from farspan.engine_ext.metadata import PrefillGroup
from farspan.engine_ext.selection.methods import FlexSelector, LayerShape
from farspan.kernels.rotary_turn import make_rotary_shift
from farspan.kernels.tiles import make_prefill_tiles

HEAD_DIM, PAGE = 64, 128
GAMMA = 0.9
NUM_PAGES = 16


def codes(num_tokens: int) -> torch.Tensor:
    """[num_tokens, HEAD_DIM] nearly orthogonal unit vectors, one a position."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(num_tokens, HEAD_DIM, generator=generator), dim=-1)


class Layer:
    """Requests whose keys are the codes of their positions. A head asks for the code a distance back, or for noise."""

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
            # Before a key at its distance exists, a head looks at nothing in particular.
            wanted = [
                torch.where((position >= distance)[:, None], key[position - distance] * 120, 0.0)
                for distance in distances
            ]
            queries.append(torch.stack(wanted, dim=1))
        self.query = torch.cat(queries)
        starts = torch.tensor([0] + [query_len for query_len, _ in chunks]).cumsum(0).int()
        seq_lens = [seq_len for _, seq_len in chunks]
        self.group = PrefillGroup(
            prefill=FlexPrefill(gamma=GAMMA),
            token_start=0,
            num_tokens=len(self.query),
            query_start_loc=starts,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=table,
            max_query_len=max(query_len for query_len, _ in chunks),
            max_seq_len=max(seq_lens),
            tiles=make_prefill_tiles(starts.tolist(), seq_lens, 128, torch.device("cpu")),
            request_ids=torch.arange(len(chunks), dtype=torch.int32),
            is_shifted=shift is not None,
        )
        self.shape = LayerShape(
            layer_index=0, num_q_heads=len(distances), num_kv_heads=num_kv_heads,
            total_num_kv_heads=num_kv_heads, scale=HEAD_DIM**-0.5, tp_rank=0, tp_size=1, device=torch.device("cpu"),
        )  # fmt: skip
        self.string = None
        if shift is not None:
            inv_freq = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
            self.string = make_rotary_shift(inv_freq, shift, 16, is_neox=True, device=torch.device("cpu"))

    def dense(self) -> torch.Tensor:
        """Exact attention, [num_tokens, num_q_heads, HEAD_DIM]."""
        out = torch.empty_like(self.query)
        CpuLauncher().prefill(self.query, self.cache, self.group, None, self.shape.scale, self.string, out)
        return out

    def run(self, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, FlexSelector]:
        """Out of the sparse launch, out in the end, the heads computed again, and the selector."""
        selector = FlexSelector(FlexPrefill(gamma=GAMMA, min_budget=0, min_seq_len=0, **options), self.shape)  # type: ignore[arg-type]
        selector.string = self.string
        launcher, scale, string = CpuLauncher(), self.shape.scale, self.string
        out, lse = torch.empty_like(self.query), torch.empty(self.shape.num_q_heads, len(self.query))
        lists = selector.block_lists_for(self.query, self.cache, self.group)
        launcher.prefill(self.query, self.cache, self.group, lists, scale, string, out, lse)
        sparse = out.clone()
        short = selector.measure(self.query, self.cache, self.group, lse)
        if short is not None:
            launcher.prefill(self.query, self.cache, self.group, None, scale, string, out, lse, short)
        return sparse, out, short, selector


@pytest.mark.parametrize("options", [{}, {"share_kv_group": True}], ids=["per-head", "shared"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1], ids=["gqa1", "gqa2", "gqa4"])
def test_the_head_and_request_that_fail_are_repaired(num_kv_heads: int, options: dict[str, bool]) -> None:
    # Of request 0's queries, [600, 1500), those before 1100 have no key 1100 back yet. Request 1 is too short for one.
    layer = Layer([(900, 1500), (65, 420)], [90, 1100, 90, 90], num_kv_heads)
    sparse, out, short, selector = layer.run(**options)
    assert short is not None
    expected = torch.zeros(4, 2, dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(short, expected)
    dense = layer.dense()
    torch.testing.assert_close(out[:900, 1], dense[:900, 1], atol=1e-5, rtol=1e-5)
    assert float((sparse - dense)[:500, 1].abs().mean()) > 5 * float((out - dense)[:500].abs().mean())
    others = torch.ones(len(out), 4, dtype=torch.bool)
    others[:900, 1] = False
    assert torch.equal(out[others], sparse[others])
    rows = selector.stats.rows()
    assert [row["repaired"] for row in rows] == [0.0, 0.5, 0.0, 0.0]
    assert all(row["coverage"] >= GAMMA for row in rows)
    assert rows[1]["density"] > 0.8
    # What was measured before the repair raises the budgets to come.
    assert float(selector.budgets.coverage[1]) < GAMMA
    assert float(selector.budgets.strictness[1]) < 1


def test_under_shifted_positions() -> None:
    layer = Layer([(900, 1500)], [90, 1100], 1, shift=1400)
    _, out, short, _ = layer.run()
    assert short is not None
    assert short.tolist() == [[False], [True]]
    torch.testing.assert_close(out[:, 1], layer.dense()[:, 1], atol=1e-5, rtol=1e-5)


def test_a_limit_on_the_budget_goes_before_gamma() -> None:
    layer = Layer([(900, 1500)], [90, 1100], 1)
    sparse, out, short, selector = layer.run(max_budget=256)
    assert short is None
    assert torch.equal(sparse, out)
    assert selector.stats.rows()[1]["coverage"] < GAMMA - 0.05
    assert selector.stats.rows()[1]["repaired"] == 0.0


@pytest.mark.parametrize("query_len", [1, 2, 3])
def test_chunks_of_a_few_queries(query_len: int) -> None:
    layer = Layer([(query_len, 1300), (query_len, query_len)], [90, 1100], 1)
    sparse, out, short, _ = layer.run()
    assert short is not None
    assert not short.any()
    assert torch.equal(sparse, out)
    torch.testing.assert_close(out, layer.dense(), atol=0.1, rtol=0.1)


def test_nothing_is_measured_where_it_is_switched_off() -> None:
    layer = Layer([(900, 1500)], [90, 1100], 1)
    assert FlexSelector(FlexPrefill(), layer.shape).measures
    assert not FlexSelector(FlexPrefill(coverage_rows=0), layer.shape).measures
