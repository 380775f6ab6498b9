"""What the layers of a rank chose and kept, on its way to the host without anybody waiting for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from farspan.engine_ext.selection.stats import SelectionStats


@dataclass
class Copy:
    """Sums of a moment on their way to the host."""

    arrived: torch.cuda.Event | None
    """None where the sums were in host memory before."""
    chunks: int
    seconds: float
    num_resets: int


class SelectionReporter:
    """Sums over all layers and heads of a rank, told step by step."""

    def __init__(self, stats: Sequence[SelectionStats]) -> None:
        self.stats = stats
        is_gpu = stats[0].listed_blocks.is_cuda
        self.sums = torch.empty(5, dtype=torch.float64, pin_memory=is_gpu)
        """In host memory: of `copy`, once it has arrived."""
        self.copy: Copy | None = None
        self.told: dict[str, float] = {}
        self.num_resets = self.chunks = 0

    def report(self) -> dict[str, float] | None:
        """What was added up since the last report, once the device has it; else None. Never waits for the device.

        blocks, causal_blocks: block reads of all heads, and those of dense attention; kept, kept_of: sum and number of
        shares of the attention mass; least_kept: the least of them since the last reset, absent before there is one;
        seconds: of the device for choosing blocks; chunks: of requests, each counted once. Numbers that a reset of the
        statistics finds unreported are lost.
        """
        found = None
        if self.copy is not None and (self.copy.arrived is None or self.copy.arrived.query()):
            found, self.copy = self._added(self.copy), None
        if self.copy is None and (self.stats[0].num_resets, self.stats[0].chunks) != (self.num_resets, self.chunks):
            self.copy = self._start()
        return found

    def _start(self) -> Copy:
        first = self.stats[0]
        self.num_resets, self.chunks = first.num_resets, first.chunks
        listed = torch.stack([each.listed_blocks for each in self.stats])
        causal = torch.stack([each.causal_blocks for each in self.stats]).sum() * listed.shape[1]
        kept = torch.stack([each.coverage.total for each in self.stats]).sum()
        kept_of = torch.stack([each.coverage.count for each in self.stats]).sum() * listed.shape[1]
        least = torch.stack([each.coverage.least for each in self.stats]).amin()
        self.sums.copy_(torch.stack([listed.sum(), causal, kept, kept_of, least]), non_blocking=True)
        arrived = None
        if listed.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        seconds = sum(each.time.finished_ms for each in self.stats) / 1e3
        return Copy(arrived, self.chunks, seconds, self.num_resets)

    def _added(self, copy: Copy) -> dict[str, float]:
        *sums, least = self.sums.tolist()
        now = dict(zip(("blocks", "causal_blocks", "kept", "kept_of"), sums, strict=True))
        now |= {"seconds": copy.seconds, "chunks": copy.chunks, "num_resets": copy.num_resets}
        before = self.told if self.told.get("num_resets") == copy.num_resets else {}
        added = {name: number - before.get(name, 0) for name, number in now.items() if name != "num_resets"}
        self.told = now
        return added | ({"least_kept": least} if now["kept_of"] > 0 else {})
