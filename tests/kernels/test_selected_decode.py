"""Selective decode: bounds of keys hold, the choice keeps what it promises, and all kernels follow their reference."""

from dataclasses import dataclass, replace

import pytest
import torch
from farspan.kernels.batch import KVView
from farspan.kernels.decode import paged_decode
from farspan.kernels.kv_gather import PagePools, host_offsets
from farspan.kernels.page_bounds import PageBounds, bound_pages, make_page_bounds, weigh_pages
from farspan.kernels.page_choice import Rule, list_host_pages
from farspan.kernels.page_choice_reference import (
    bound_pages_cpu,
    choose,
    estimated_keys,
    key_bounds,
    selected_decode_cpu,
    weights_of_pages,
)
from farspan.kernels.selected_decode import SelectionBuffers, make_selection_buffers, selected_decode

from tests.kernels import helpers
from tests.kernels.helpers import Inputs, assert_attention_close, make_batch


@pytest.fixture(autouse=True)
def _few_recent_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short requests too, most pages may be left out."""
    for module in ("page_choice", "page_choice_reference"):
        monkeypatch.setattr(f"farspan.kernels.{module}.SELECT_RECENT_TOKENS", 32)


@dataclass(frozen=True)
class Case:
    """A decode step whose pages lie in both pools."""

    inputs: Inputs
    kv: KVView
    bounds: PageBounds
    block_table: torch.Tensor

    @property
    def batch(self) -> helpers.PagedBatch:
        return replace(self.inputs.paged, block_table=self.block_table)

    def results(self) -> tuple[torch.Tensor, ...]:
        """NaN-filled out, lse and left."""
        query = self.inputs.query
        lse = torch.full((query.shape[1], query.shape[0]), float("nan"), device=query.device)
        return torch.full_like(query, float("nan")), lse, lse.clone()

    def by_reference(self, rule: Rule) -> tuple[torch.Tensor, ...]:
        """out, lse, left and totals on the CPU."""
        out, lse, left = (each.cpu() for each in self.results())
        totals = torch.zeros(2, dtype=torch.int64)
        batch = replace(self.batch, block_table=self.block_table.cpu(), kv_lens=self.batch.kv_lens.cpu())
        assert self.kv.host_pages is not None
        kv = KVView(self.kv.pages.cpu(), 0, self.kv.host_pages)
        bounds = PageBounds(self.bounds.ends.cpu(), self.bounds.cells.cpu())
        selected_decode_cpu(
            self.inputs.query.cpu(), kv, bounds, batch, self.inputs.scale, rule,
            out=out, lse=lse, left=left, totals=totals,
        )  # fmt: skip
        return out, lse, left, totals

    def by_kernels(self, rule: Rule, num_splits: int = 2) -> tuple[torch.Tensor, ...]:
        """The same by the kernels, with the buffers they used."""
        query, batch = self.inputs.query, self.batch
        buffers = self.buffers()
        out, lse, left = self.results()
        selected_decode(
            query, self.kv, self.bounds, batch, self.inputs.scale, rule, buffers,
            num_splits=num_splits, min_split_keys=16, out=out, lse=lse, left=left,
        )  # fmt: skip
        return out, lse, left, buffers.totals

    def buffers(self) -> SelectionBuffers:
        batch, heads = self.batch, self.inputs.query.shape[1]
        width = batch.block_table.shape[1]
        buffers = make_selection_buffers(
            len(batch.kv_lens) + 1, self.kv.num_kv_heads, heads, width, batch.kv_lens.device
        )
        choice = buffers.choice
        list_host_pages(batch.block_table, batch.kv_lens, self.kv.page_size, choice.host_places, choice.num_host)
        return buffers


def make_case(
    lens: tuple[int, ...], device: torch.device, *, host: str = "most", sharpness: float = 3.0, **shape: object
) -> Case:
    """Of the pages of each request `most`, but not the last, `all` or `none` are in host memory; elsewhere is NaN."""
    drawn = [max(length, 1) for length in lens]
    inputs = make_batch([1] * len(lens), drawn, sharpness=sharpness, device=device, **shape)  # type: ignore[arg-type]
    inputs = replace(inputs, seq_lens=torch.tensor(lens, dtype=torch.int32, device=device))
    num_pages, num_kv_heads, page_size, width = inputs.kv_cache.shape
    host_pages = inputs.kv_cache.cpu().transpose(0, 1).contiguous().transpose(0, 1)
    if device.type == "cuda":
        host_pages = host_pages.transpose(0, 1).pin_memory().transpose(0, 1)
    table = inputs.block_table.clone()
    on_host = torch.zeros(num_pages, dtype=torch.bool)
    for request, length in enumerate(lens):
        count = -(-length // page_size)
        for place in range(count):
            page = int(table[request, place])
            if host == "all" or (host == "most" and place < count - 1 and place % 4 != 3):
                on_host[page] = True
                table[request, place] = -1 - page
    bounds = make_page_bounds(num_kv_heads, num_pages, page_size, width // 2, inputs.kv_cache.dtype, device)
    slots = inputs.kv_cache.transpose(0, 1).contiguous()
    pools = PagePools(slots, (host_pages.transpose(0, 1),), host_offsets(slots, (host_pages.transpose(0, 1),)))
    pages = on_host.nonzero()[:, 0].int().to(device)
    bound_pages(pools, bounds, pages, pages)
    device_pages = inputs.kv_cache.clone()
    device_pages[on_host] = float("nan")
    host_pages[~on_host] = float("nan")
    return Case(inputs, KVView(device_pages, 0, host_pages), bounds, table)


NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""Triton's interpreter multiplies no bfloat16."""
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        {"page_size": 16, "head_dim": 64, "num_heads": 4, "num_kv_heads": 2},
        {"page_size": 32, "head_dim": 96, "num_heads": 7, "num_kv_heads": 1, "dtype": torch.float16},
        {"page_size": 128, "head_dim": 128, "num_heads": 4, "num_kv_heads": 2, "dtype": NARROW},
    ],
    ids=["page16-d64-float32", "page32-d96-float16", "page128-d128-narrow"],
)


@SHAPES
def test_bounds_hold_every_key(shape: dict[str, object], device: torch.device) -> None:
    case = make_case((300,), device, host="all", **shape)
    ends, cells = (each.cpu() for each in (case.bounds.ends, case.bounds.cells))
    full = [-1 - int(entry) for entry in case.block_table[0, : 300 // case.kv.page_size]]
    assert case.kv.host_pages is not None
    keys = case.kv.host_pages[full][..., : case.kv.head_dim]
    expected = key_bounds(keys)
    assert torch.equal(ends[full], expected[0])
    least, largest = ends[full].float().unbind(-2)
    width = (largest - least) / 15
    error = (estimated_keys(ends[full], cells[full]) - keys.float()).abs()
    assert (error <= 0.5001 * width.unsqueeze(-2) + 1e-6).all()
    # The division rounds otherwise on a GPU, and numbers of 16 bits lie between two cells often.
    assert (cells[full] != expected[1]).float().mean() < (1e-2 if device.type == "cuda" else 1e-9)


@SHAPES
def test_weights_are_within_their_bounds(shape: dict[str, object], device: torch.device) -> None:
    case = make_case((90, 0, 200), device, **shape)
    buffers = case.buffers()
    choice, batch, query = buffers.choice, case.batch, case.inputs.query
    for each in (buffers.estimates, buffers.upper):
        each.fill_(float("nan"))
    weigh_pages(
        query, case.bounds, batch.block_table, batch.kv_lens, choice.host_places, choice.num_host, case.inputs.scale,
        buffers.estimates, buffers.upper, num_programs=3,
    )  # fmt: skip
    assert choice.num_host[1] == 0
    for request in (0, 2):
        count = int(choice.num_host[request])
        places = choice.host_places[request, :count].long()
        blocks = (-1 - case.block_table[request, places].long()).cpu()
        heads = query[request].cpu().float().unflatten(0, (case.kv.num_kv_heads, -1))
        assert case.kv.host_pages is not None
        keys = case.kv.host_pages.transpose(0, 1)[:, blocks][..., : case.kv.head_dim].float()
        true = torch.einsum("kgd,kptd->kgpt", heads * case.inputs.scale, keys).logsumexp(-1).flatten(0, 1)
        found, upper = (each[request, :, :count].cpu() for each in (buffers.estimates, buffers.upper))
        assert ((true - found).abs() <= upper - found).all()
        ends, cells = (each.cpu().transpose(0, 1)[:, blocks] for each in (case.bounds.ends, case.bounds.cells))
        expected = weights_of_pages(heads, ends, cells, case.inputs.scale)
        rounding = 1e-4 if query.dtype == torch.float32 else 0.1
        torch.testing.assert_close(found, expected[0].flatten(0, 1), atol=rounding, rtol=1e-3)
        torch.testing.assert_close(upper - found, (expected[1] - expected[0]).flatten(0, 1), atol=1e-3, rtol=1e-3)


@SHAPES
@pytest.mark.parametrize("host", ["most", "none"])
def test_all_of_the_mass_is_exact_decode(shape: dict[str, object], host: str, device: torch.device) -> None:
    case = make_case((1, 0, 200), device, host=host, **shape)
    out, lse, left, totals = case.by_kernels(Rule(1.0))
    expected = case.results()
    paged_decode(
        case.inputs.query, case.kv, case.batch, case.inputs.scale, num_splits=2, min_split_keys=16, out=expected[0],
        lse=expected[1],
    )  # fmt: skip
    assert_attention_close(out, lse, expected[0], expected[1], out.dtype)
    assert (left == float("-inf")).all()
    assert totals[0] == totals[1]
    assert (totals[1] > 0) == (host != "none")


@SHAPES
@pytest.mark.parametrize(("coverage", "by_bounds"), [(0.6, False), (0.9, True)], ids=["estimates", "bounds"])
def test_kernels_follow_the_reference(
    shape: dict[str, object], by_bounds: bool, coverage: float, device: torch.device
) -> None:
    case = make_case((90, 0, 1, 180), device, **shape)
    rule = Rule(coverage, by_bounds)
    out, lse, left, totals = case.by_kernels(rule)
    expected = case.by_reference(rule)
    # In 16 bits a page near the threshold may fall on the other side.
    slack = 0 if case.inputs.query.dtype == torch.float32 else 3
    assert (totals.cpu() - expected[3]).abs().max() <= slack
    if torch.equal(totals.cpu(), expected[3]):
        assert_attention_close(out.cpu(), lse.cpu(), expected[0], expected[1], out.dtype)
        torch.testing.assert_close(left.cpu(), expected[2], atol=0.1 if slack else 1e-3, rtol=1e-3)
    assert 0 < totals[0] <= totals[1]
    assert totals[0] < totals[1] or by_bounds or case.kv.page_size == 128
    # What was kept is what was promised, and what is certified is never more than that.
    full_lse = case.by_reference(Rule(1.0))[1]
    real = full_lse > float("-inf")
    kept = (lse.cpu() - full_lse).exp()[real]
    certified = torch.sigmoid(lse.cpu() - left.cpu())[real]
    assert (certified <= kept + 1e-3).all()
    assert kept.min() >= coverage - (1e-3 if by_bounds else 0.03)
    if by_bounds:
        assert certified.min() >= coverage - 1e-3


def test_pages_that_are_always_read(device: torch.device) -> None:
    """The first page and the recent ones, however little they weigh."""
    estimate = torch.full((1, 2, 6), -30.0)
    is_kept = torch.tensor([True, False, False, False, True, True])
    held = torch.zeros(1, 2)
    assert choose(estimate, estimate, held, is_kept, Rule(0.5)).tolist() == [is_kept.tolist()]
    estimate[0, 1, 2] = 5.0
    assert choose(estimate, estimate, held, is_kept, Rule(0.9))[0].nonzero()[:, 0].tolist() == [0, 2, 4, 5]
    case = make_case((300,), device, host="all", page_size=16)
    buffers = case.buffers()
    out, lse, left = case.results()
    selected_decode(
        case.inputs.query * 0, case.kv, case.bounds, case.batch, 1.0, Rule(1e-6), buffers, num_splits=2,
        min_split_keys=16, out=out, lse=lse, left=left,
    )  # fmt: skip
    for head in range(2):
        count = int(buffers.choice.num_chosen.flatten()[head])
        blocks = -1 - case.block_table[0, [0, 16, 17, 18]]
        assert buffers.choice.chosen[0, head, :count].tolist() == blocks.tolist()


def test_rows_that_pad_a_graph_read_nothing(device: torch.device) -> None:
    """What an earlier step listed for them is out of date, and so is their block table."""
    case = make_case((90, 60), device, page_size=16)
    buffers = case.buffers()
    case.inputs.seq_lens[1] = 0
    case.block_table[1] = helpers.GARBAGE_PAGE
    out, lse, left = case.results()
    selected_decode(
        case.inputs.query, case.kv, case.bounds, case.batch, case.inputs.scale, Rule(0.9), buffers, num_splits=2,
        min_split_keys=16, out=out, lse=lse, left=left,
    )  # fmt: skip
    assert (out[1] == 0).all()
    assert (lse[:, 1] == float("-inf")).all()
    assert not out[0].isnan().any()


def test_bounds_of_pages_that_come_again(device: torch.device) -> None:
    """Each block has the bounds of what was last copied from its slot; those of others stay."""
    slots = torch.randn(3, 4, 16, 128, device=device)
    pools = PagePools(slots, (), torch.zeros(3, dtype=torch.int64, device=device))
    bounds = make_page_bounds(3, 7, 16, 64, torch.float32, device)
    expected = make_page_bounds(3, 7, 16, 64, torch.float32, torch.device("cpu"))
    for blocks, places in (([2, 5], [0, 3]), ([5, 6], [1, 2]), ([], [])):
        moves = [torch.tensor(each, dtype=torch.int32, device=device) for each in (blocks, places)]
        bound_pages(pools, bounds, *moves)
        on_host = PagePools(slots.cpu(), (), pools.host_offsets.cpu())
        bound_pages_cpu(on_host, expected, *(each.cpu() for each in moves))
    assert torch.equal(bounds.ends.cpu(), expected.ends)
    assert (bounds.cells.cpu() != expected.cells).float().mean() < 1e-3
