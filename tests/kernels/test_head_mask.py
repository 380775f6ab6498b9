"""Prefill of some heads of some requests, over what is there already: the launch that repairs sparse prefill."""

from dataclasses import dataclass

import pytest
import torch
from farspan.kernels.cpu_attention import cpu_attention
from farspan.kernels.flex.coverage import COVERAGE_SLACK, measure_coverage, sample_rows, short_heads
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.rotary_turn import RotaryShift, make_rotary_shift

from tests.kernels.helpers import (
    PagedBatch,
    assert_attention_close,
    make_batch,
    poisoned_like,
    random_block_lists,
    reference_attention,
)
from tests.kernels.string_helpers import inverse_frequencies

F16, F32 = torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    heads: tuple[int, int]
    head_dim: int = 64
    page_size: int = 16
    block_size: int = 64
    dtype: torch.dtype = F32

    @property
    def id(self) -> str:
        lens = "-".join(f"q{query}kv{kv}" for query, kv in zip(self.query_lens, self.seq_lens, strict=True))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{lens}-gqa{self.heads[0] // self.heads[1]}-d{self.head_dim}-page{self.page_size}-{dtype}"

    def draw(self, device: torch.device) -> PagedBatch:
        return make_batch(
            self.query_lens, self.seq_lens, num_heads=self.heads[0], num_kv_heads=self.heads[1],
            head_dim=self.head_dim, page_size=self.page_size, dtype=self.dtype, device=device, sharpness=2.0,
        )  # fmt: skip


CASES = [
    Case((130, 63), (200, 63), (4, 4)),
    # Few tokens, so that the heads of a group lie in one program.
    Case((5, 1, 3), (133, 70, 3), (8, 2)),
    Case((17, 40), (81, 127), (7, 1), head_dim=96, page_size=32, block_size=128, dtype=F16),
    Case((129, 0, 65), (129, 9, 150), (8, 2), head_dim=128, page_size=128, block_size=128, dtype=F16),
    pytest.param(Case((1000, 63, 5), (3000, 1063, 500), (32, 8), 128, 128, 128, torch.bfloat16), marks=pytest.mark.gpu),
    pytest.param(Case((3, 5), (3000, 1063), (28, 4), 128, 128, 128, torch.bfloat16), marks=pytest.mark.gpu),
]


def case_id(value: object) -> str | None:
    return value.id if isinstance(value, Case) else None


def launch(
    batch: PagedBatch,
    case: Case,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    through: str = "triton",
    string: RotaryShift | None = None,
) -> None:
    """Compute the heads of the mask into `out` and `lse`."""
    arguments = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, batch.query_start_loc)
    if through == "cpu":
        cpu_attention(*arguments, batch.scale, out=out, lse=lse, head_mask=mask, string=string)
        return
    tiles = batch.tiles(case.block_size)
    max_query_len = max(case.query_lens)
    paged_prefill(
        *arguments, tiles, batch.scale, head_mask=mask, max_query_len=max_query_len, out=out, lse=lse, string=string
    )  # fmt: skip


def poisoned_outputs(batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _ = batch.query.shape
    return poisoned_like(batch.query), poisoned_like(torch.empty(num_heads, num_tokens, device=batch.query.device))


def of_tokens(mask: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
    """[num_q_heads, num_tokens] bool from [num_q_heads, num_reqs]."""
    return mask.repeat_interleave(batch.query_start_loc.diff().long(), dim=1)


def drawn_mask(case: Case, device: torch.device) -> torch.Tensor:
    """About half of the heads of every request: some groups whole, some in part, some not at all."""
    mask = torch.rand(case.heads[0], len(case.query_lens)) < 0.5
    mask[0, 0], mask[1, 0] = True, False
    return mask.to(device)


@pytest.mark.parametrize("through", ["triton", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_wanted_heads_are_exact_and_the_others_untouched(device: torch.device, case: Case, through: str) -> None:
    if through == "cpu":
        device = torch.device("cpu")
    batch = case.draw(device)
    mask = drawn_mask(case, device)
    out, lse = poisoned_outputs(batch)
    # A sparse launch's results, which must survive to the last bit.
    tiles = batch.tiles(case.block_size)
    lists = random_block_lists(tiles, case.heads[0], 0.3)
    arguments = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, batch.query_start_loc)
    if through == "cpu":
        cpu_attention(*arguments, batch.scale, out=out, lse=lse, tiles=tiles, block_lists=lists)
    else:
        paged_prefill(*arguments, tiles, batch.scale, block_lists=lists, out=out, lse=lse)
    before = out.clone(), lse.clone()
    launch(batch, case, mask, out, lse, through=through)
    wanted = of_tokens(mask, batch)
    exact_out, exact_lse = reference_attention(batch)
    expected_lse = torch.where(wanted, exact_lse, before[1])
    expected_out = torch.where(wanted.T[..., None], exact_out, before[0].float())
    assert_attention_close(out, lse, expected_out, expected_lse, case.dtype)
    assert torch.equal(lse[~wanted], before[1][~wanted])
    assert torch.equal(out.transpose(0, 1)[~wanted], before[0].transpose(0, 1)[~wanted])


@pytest.mark.parametrize("through", ["triton", "cpu"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=case_id)
def test_no_head_and_every_head(device: torch.device, case: Case, through: str) -> None:
    device = device if through == "triton" else torch.device("cpu")
    batch = case.draw(device)
    out, lse = poisoned_outputs(batch)
    nobody = torch.zeros(case.heads[0], len(case.query_lens), dtype=torch.bool, device=device)
    launch(batch, case, nobody, out, lse, through=through)
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())
    launch(batch, case, ~nobody, out, lse, through=through)
    assert_attention_close(out, lse, *reference_attention(batch), case.dtype)


@pytest.mark.parametrize("through", ["triton", "cpu"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=case_id)
def test_under_shifted_positions(device: torch.device, case: Case, through: str) -> None:
    device = device if through == "triton" else torch.device("cpu")
    batch = case.draw(device)
    string = make_rotary_shift(inverse_frequencies(case.head_dim), 50, 10, is_neox=True, device=device)
    out, lse = poisoned_outputs(batch)
    launch(batch, case, None, out, lse, through=through, string=string)
    mask = drawn_mask(case, device)
    wanted = of_tokens(mask, batch)
    some_out, some_lse = poisoned_outputs(batch)
    launch(batch, case, mask, some_out, some_lse, through=through, string=string)
    assert bool(some_lse[~wanted].isnan().all())
    assert bool(some_out.transpose(0, 1)[~wanted].isnan().all())
    expected_out = torch.where(wanted.T[..., None], out.float(), 0.0)
    expected_lse = torch.where(wanted, lse, 0.0)
    some_out, some_lse = some_out.nan_to_num(0.0), some_lse.nan_to_num(0.0)
    assert_attention_close(some_out, some_lse, expected_out, expected_lse, case.dtype)


def test_short_heads_are_those_of_one_request() -> None:
    """Two requests with promises of their own; a head may fail in one of them."""
    coverage = torch.tensor([[[1.0, 0.6], [0.9, 0.9]], [[0.92, 0.9], [0.1, 0.7]]])
    assert short_heads(coverage, torch.tensor([0.95, 0.5])).tolist() == [[True, False], [False, True]]
    assert not short_heads(torch.full((1, 1, 4), 0.9 - COVERAGE_SLACK + 1e-4), torch.tensor([0.9])).any()


@pytest.mark.parametrize("query_lens", [(1, 2, 3), (1,)], ids=str)
def test_chunks_shorter_than_the_sample(query_lens: tuple[int, ...]) -> None:
    seq_lens = [length + 90 for length in query_lens]
    batch = make_batch(query_lens, seq_lens, sharpness=3.0)
    arguments = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, batch.query_start_loc)
    rows = sample_rows(batch.query_start_loc, 4)
    for request, of_request in enumerate(rows.tolist()):
        start, end = batch.query_start_loc[request : request + 2].tolist()
        assert all(start <= row < end for row in of_request)
    _, lse = reference_attention(batch)
    coverage = measure_coverage(*arguments, batch.scale, lse, rows)
    torch.testing.assert_close(coverage, torch.ones(4, len(query_lens), 4), atol=1e-4, rtol=0)
    assert not short_heads(coverage, torch.full((len(query_lens),), 0.95)).any()


def test_the_first_sampled_row_lies_early() -> None:
    """The queries unlike those that chose the blocks are a chunk's first."""
    starts = torch.tensor([0, 16384, 16384 + 100], dtype=torch.int32)
    rows = sample_rows(starts, 4) - starts[:-1, None]
    assert 0 < int(rows[0, 0]) < 0.1 * 16384
    assert (rows[0] // 4096).tolist() == [0, 1, 2, 3]
    assert (rows[1] // 25).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("chunk", [1024, 2048, 4096, 8192, 16384, 32768, 131072], ids=str)
def test_sampled_rows_do_not_begin_query_blocks(chunk: int) -> None:
    """Heads that look a few tokens back may lose everything there, and nothing elsewhere."""
    rows = sample_rows(torch.tensor([0, chunk], dtype=torch.int32), 4)
    assert int((rows % 128).min()) >= 16
