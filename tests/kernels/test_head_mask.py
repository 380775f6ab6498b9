"""Prefill of some heads of some requests over earlier results in the outputs: the launch that repairs flex prefill."""

from dataclasses import dataclass

import pytest
import torch
from farspan.kernels.cpu_attention import cpu_attention
from farspan.kernels.flex.coverage import sample_places
from farspan.kernels.prefill import paged_prefill

from tests.kernels.helpers import (
    Inputs,
    assert_attention_close,
    make_batch,
    poisoned_like,
    random_block_lists,
    reference_attention,
)
from tests.kernels.string_helpers import Shift, inverse_frequencies, make_shift

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

    def draw(self, device: torch.device) -> Inputs:
        return make_batch(
            self.query_lens, self.seq_lens, num_heads=self.heads[0], num_kv_heads=self.heads[1],
            head_dim=self.head_dim, page_size=self.page_size, dtype=self.dtype, device=device, sharpness=2.0,
        )  # fmt: skip


CASES = [
    Case((130, 63), (200, 63), (4, 4)),
    # Few tokens, so that one program computes all heads of a group.
    Case((5, 1, 3), (133, 70, 3), (8, 2)),
    Case((17, 40), (81, 127), (7, 1), head_dim=96, page_size=32, block_size=128, dtype=F16),
    Case((129, 0, 65), (129, 9, 150), (8, 2), head_dim=128, page_size=128, block_size=128, dtype=F16),
    pytest.param(Case((1000, 63, 5), (3000, 1063, 500), (32, 8), 128, 128, 128, torch.bfloat16), marks=pytest.mark.gpu),
    pytest.param(Case((3, 5), (3000, 1063), (28, 4), 128, 128, 128, torch.bfloat16), marks=pytest.mark.gpu),
]


def case_id(value: object) -> str | None:
    return value.id if isinstance(value, Case) else None


def launch(
    batch: Inputs,
    case: Case,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    through: str = "triton",
    turn: Shift | None = None,
) -> None:
    """Compute the heads of the mask into `out` and `lse`."""
    arguments = (batch.query, batch.kv, batch.paged)
    if through == "cpu":
        cpu_attention(*arguments, batch.scale, out=out, lse=lse, head_mask=mask, turn=turn)
        return
    tiles = batch.tiles(case.block_size)
    paged_prefill(
        *arguments, tiles, batch.scale, head_mask=mask, out=out, lse=lse, turn=turn
    )  # fmt: skip


def poisoned_outputs(batch: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _ = batch.query.shape
    return poisoned_like(batch.query), poisoned_like(torch.empty(num_heads, num_tokens, device=batch.query.device))


def of_tokens(mask: torch.Tensor, batch: Inputs) -> torch.Tensor:
    """[num_q_heads, num_tokens] bool from [num_q_heads, num_reqs]."""
    return mask.repeat_interleave(batch.query_start_loc.diff().long(), dim=1)


def drawn_mask(case: Case, device: torch.device) -> torch.Tensor:
    """About half of the heads of every request, among them one of two heads of a group."""
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
    # Results of a sparse launch, which must stay the same bit for bit where no head is wanted.
    tiles = batch.tiles(case.block_size)
    lists = random_block_lists(tiles, case.heads[0], 0.3)
    arguments = (batch.query, batch.kv, batch.paged)
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
    turn = make_shift(inverse_frequencies(case.head_dim), 50, 10, is_neox=True, device=device)
    out, lse = poisoned_outputs(batch)
    launch(batch, case, None, out, lse, through=through, turn=turn)
    mask = drawn_mask(case, device)
    wanted = of_tokens(mask, batch)
    some_out, some_lse = poisoned_outputs(batch)
    launch(batch, case, mask, some_out, some_lse, through=through, turn=turn)
    assert bool(some_lse[~wanted].isnan().all())
    assert bool(some_out.transpose(0, 1)[~wanted].isnan().all())
    expected_out = torch.where(wanted.T[..., None], out.float(), 0.0)
    expected_lse = torch.where(wanted, lse, 0.0)
    some_out, some_lse = some_out.nan_to_num(0.0), some_lse.nan_to_num(0.0)
    assert_attention_close(some_out, some_lse, expected_out, expected_lse, case.dtype)


@pytest.mark.parametrize("query_len", [1, 2, 3, 100])
def test_samples_are_rows_of_the_chunk(query_len: int) -> None:
    places = sample_places(query_len, 4)
    assert len(places) == 4
    assert places == sorted(places)
    assert all(0 <= place < query_len for place in places)


def test_the_first_sampled_row_is_early() -> None:
    """Selection looks at a chunk's last queries, so its first ones are the most likely to lose attention mass."""
    places = sample_places(16384, 4)
    assert 0 < places[0] < 0.1 * 16384
    assert [place // 4096 for place in places] == [0, 1, 2, 3]
    assert [place // 25 for place in sample_places(100, 4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("chunk", [1024, 2048, 4096, 8192, 16384, 32768, 131072], ids=str)
def test_sampled_rows_do_not_begin_query_blocks(chunk: int) -> None:
    """On the first row of a query block, heads that look a few tokens back may lose everything; elsewhere nothing."""
    assert min(place % 128 for place in sample_places(chunk, 4)) >= 16
