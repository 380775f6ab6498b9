"""The Triton stages of the dynamic selection against their PyTorch twins, and what the lists promise."""

from dataclasses import dataclass, field

import pytest
import torch
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex import estimate as flex_estimate
from farspan.kernels.flex import reference as flex_reference
from farspan.kernels.flex import select as flex_select
from farspan.kernels.flex.types import NO_LIMIT, Budget, FlexEstimate, FlexSelection
from farspan.kernels.tiles import BlockLists

from tests.kernels.helpers import Inputs, make_batch
from tests.kernels.string_helpers import Shift, inverse_frequencies, make_shift


@dataclass(frozen=True)
class Case:
    """A varlen batch; every request prefills."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    group: int = 2
    head_dim: int = 32
    page_size: int = 16
    block_size: int = 64
    gamma: float = 0.9
    tau: float = 0.0
    min_blocks: int = 1
    max_blocks: int = NO_LIMIT
    share: bool = False
    layout: str = "lbhnc"
    shift: int = 0
    """Distance S from which positions are shifted; 0 for ordinary positions."""
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def name(self) -> str:
        lens = "+".join(f"{q}of{kv}" for q, kv in zip(self.query_lens, self.seq_lens, strict=True))
        extras = f"{'-shared' if self.share else ''}-g{self.gamma}-tau{self.tau}-min{self.min_blocks}"
        extras += f"-string{self.shift}" if self.shift else ""
        return f"{lens}-gqa{self.group}-d{self.head_dim}-page{self.page_size}-block{self.block_size}{extras}"


CASES = [
    Case((1,), (1,)),
    Case((1,), (63,), group=1),
    Case((1000,), (1000,), tau=0.15, group=1),
    Case((320,), (640,), page_size=64, tau=0.15, share=True),
    Case((65, 200, 2), (65, 777, 130), group=1, tau=0.12, min_blocks=3),
    Case((65,), (383,), group=7, tau=0.5, page_size=32),
    Case((129, 64), (257, 320), group=4, share=True, tau=0.1, min_blocks=4),
    Case((300,), (900,), page_size=128, block_size=128, head_dim=64, tau=0.2),
    Case((300,), (700,), max_blocks=3, tau=0.1),
    Case((300,), (700,), gamma=1.0, max_blocks=5, layout="lbnhc"),
    Case((300,), (700,), gamma=1.0),
    Case((100,), (257,), head_dim=80, page_size=48),
    Case((100,), (257,), dtype=torch.float16),
    Case((100,), (700,), shift=200, tau=0.2, head_dim=64),
]


def batch_of(case: Case, device: torch.device) -> Inputs:
    # A GPU multiplies float32 slowly, and float16 operands into exact float32 products.
    dtype = torch.float16 if device.type == "cuda" else case.dtype
    return make_batch(
        case.query_lens,
        case.seq_lens,
        num_heads=2 * case.group,
        num_kv_heads=2,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=dtype,
        device=device,
        layout=case.layout,
        sharpness=3.0,
    )


def string_of(case: Case, device: torch.device) -> Shift | None:
    if not case.shift:
        return None
    inv_freq = inverse_frequencies(case.head_dim // 2)
    return make_shift(inv_freq, case.shift, 16, True, device)


def arguments_of(batch: Inputs) -> tuple[torch.Tensor, KVView, PagedBatch]:
    return batch.query, batch.kv, batch.paged


def on_cpu(found: FlexEstimate) -> FlexEstimate:
    return FlexEstimate(found.tile_mass.cpu(), found.column_share.cpu(), found.pooled_logits.cpu())


def lists_of(block_lists: BlockLists) -> list[list[list[int]]]:
    ids, counts = block_lists.block_ids.tolist(), block_lists.block_counts.tolist()
    rows = [zip(head_ids, head_counts, strict=True) for head_ids, head_counts in zip(ids, counts, strict=True)]
    return [[row[:count] for row, count in head] for head in rows]


def select_both(case: Case, batch: Inputs) -> tuple[FlexSelection, FlexSelection]:
    """Triton's selection and PyTorch's, from the same estimate so that only the selection differs."""
    device = batch.query.device
    tiles = batch.tiles(case.block_size)
    turn, cpu_turn = string_of(case, device), string_of(case, torch.device("cpu"))
    found = flex_estimate.estimate(
        *arguments_of(batch), tiles.max_kv_blocks, case.block_size, batch.scale, turn=turn, num_splits=2
    )
    budget = Budget(case.gamma, case.tau, case.min_blocks, case.max_blocks, case.group if case.share else 1)
    ours = flex_select.select(*arguments_of(batch), tiles, batch.scale, found, budget, turn=turn)
    cpu = inputs_on_cpu(batch)
    cpu_tiles = cpu.tiles(case.block_size)
    scores = flex_reference.pooled_scores(*arguments_of(cpu), cpu_tiles, batch.scale, turn=cpu_turn)
    return ours, flex_reference.select(on_cpu(found), scores, cpu_tiles, cpu.paged, budget)


def inputs_on_cpu(batch: Inputs) -> Inputs:
    return Inputs(
        **{name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in vars(batch).items()}
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_estimate_equals_reference(case: Case, device: torch.device) -> None:
    batch = batch_of(case, device)
    num_blocks = batch.tiles(case.block_size).max_kv_blocks
    shape = (num_blocks, case.block_size, batch.scale)
    turn = string_of(case, device)
    found = on_cpu(flex_estimate.estimate(*arguments_of(batch), *shape, num_splits=3, turn=turn))
    turn = string_of(case, torch.device("cpu"))
    expected = flex_reference.estimate(*arguments_of(inputs_on_cpu(batch)), *shape, turn=turn)
    torch.testing.assert_close(found.tile_mass, expected.tile_mass, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.column_share, expected.column_share, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.pooled_logits, expected.pooled_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.tile_mass.sum((0, -1)), torch.ones_like(found.tile_mass.sum((0, -1))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lists_equal_reference_and_keep_their_contract(case: Case, device: torch.device) -> None:
    batch = batch_of(case, device)
    ours, expected = select_both(case, batch)
    torch.testing.assert_close(ours.divergence.cpu(), expected.divergence, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.is_query_aware.cpu(), expected.is_query_aware)
    assert lists_of(ours.block_lists) == lists_of(expected.block_lists)
    for head in lists_of(ours.block_lists):
        for block, ids in zip(batch.tiles(case.block_size).tile_block.tolist(), head, strict=True):
            assert ids == sorted(set(ids))
            assert ids[0] == 0
            assert ids[-1] == block
            assert len(ids) >= min(case.min_blocks, block + 1)
            assert len(ids) <= max(case.max_blocks, 2)
            if case.gamma == 1 and case.max_blocks == NO_LIMIT:
                assert len(ids) == block + 1
