"""Which page lies in which slot: the table on the device, and what the host knows of it."""

import torch
from farspan.engine_ext.plan import VIEW_PRIME, Move, ResidencyPlan, view_term
from farspan.kernels.tiles import to_device


class SlotTable:
    """The device's table of blocks and slots.

    Until the first plan, every block lies in slot 0: vLLM warms up on blocks that no scheduler has placed.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.slot_of = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        """[num_blocks] int32: the slot of each block, or -1. Its memory never moves: captured graphs read it."""
        self.known: dict[int, int] = {}
        """The same on the host, without the blocks that have none; empty until the first plan."""
        self.on_host: set[int] = set()
        """Blocks whose page in host memory has been copied there and not been written to since."""
        self.view = 0

    def begin(self) -> None:
        """Start to follow plans."""
        self.slot_of.fill_(-1)
        self.slot_of[:1] = 0
        self.known = {0: 0}
        self.view = view_term(0, 0)

    def follow(self, plan: ResidencyPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """Take over a step's table.

        Returns blocks and slots of all its moves, [num_moves] int32 on the device: spills, loads, copies, drops,
        assignments.
        Raises RuntimeError where the scheduler's table is another one.
        """
        if not self.known:
            self.begin()
        leaving = (*plan.spills, *plan.drops)
        entering = (*plan.loads, *plan.assignments)
        for move in leaving:
            if self.known.pop(move.block, None) != move.slot:
                raise RuntimeError(f"farspan offload: block {move.block} does not lie in slot {move.slot}")
            self.view = (self.view - view_term(move.block, move.slot)) % VIEW_PRIME
        for move in entering:
            self.known[move.block] = move.slot
            self.view = (self.view + view_term(move.block, move.slot)) % VIEW_PRIME
        if self.view != plan.view:
            raise RuntimeError("farspan offload: the worker and the scheduler do not agree on which pages lie where")
        self.on_host.update(move.block for move in (*plan.spills, *plan.loads, *plan.copies))
        self.on_host.difference_update(plan.written)
        self.on_host.difference_update(move.block for move in plan.assignments)
        moves: tuple[Move, ...] = (*plan.spills, *plan.loads, *plan.copies, *plan.drops, *plan.assignments)
        if not moves:
            empty = self.slot_of[:0]
            return empty, empty
        staying = {move.block: move.slot for move in (*plan.copies, *entering)}
        now = dict.fromkeys((move.block for move in leaving), -1) | staying
        uploaded = to_device(
            [[move.block for move in moves], [move.slot for move in moves], [now[move.block] for move in moves]],
            self.slot_of.device,
        )
        self.slot_of[uploaded[0].long()] = uploaded[2]
        return uploaded[0], uploaded[1]

    def check_integrity(self) -> None:
        """Raise AssertionError where the device's table is not that of the host. Waits for the device."""
        if not self.known:
            return
        found = {block: slot for block, slot in enumerate(self.slot_of.tolist()) if slot >= 0}
        assert found == self.known
        assert len(set(found.values())) == len(found), "two blocks in one slot"
        assert sum(view_term(*pair) for pair in found.items()) % VIEW_PRIME == self.view
