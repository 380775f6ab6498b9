"""What the dynamic selection of one layer chose and kept, added up on the device; read only when somebody asks."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from farspan.kernels.flex.spans import Spans
from farspan.kernels.flex.types import FlexSelection, TileSelection
from farspan.kernels.tiles import BlockLists, PrefillTiles


class Mean:
    """Sum, number and least of values per head, on the device."""

    def __init__(self, num_q_heads: int, device: torch.device) -> None:
        self.total = torch.zeros(num_q_heads, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.least = torch.full((num_q_heads,), float("inf"), dtype=torch.float64, device=device)

    def add(self, values: torch.Tensor, q_heads: slice, is_real: torch.Tensor | None = None) -> None:
        """Take in [num_heads, n] values of the heads `q_heads`; is_real: [n] bool, which of them count."""
        real = torch.ones_like(values[0], dtype=torch.bool) if is_real is None else is_real
        self.total[q_heads] += torch.where(real, values, 0.0).sum(1)
        if values.shape[1] > 0:
            least = torch.where(real, values, float("inf")).amin(1).double()
            self.least[q_heads] = torch.minimum(self.least[q_heads], least)
        # Passes over the other heads of the same chunks bring the same number again.
        if q_heads.start == 0:
            self.count += real.sum()

    def reset(self) -> None:
        self.total.zero_()
        self.count.zero_()
        self.least.fill_(float("inf"))


class DeviceTime:
    """How long the device takes for some work, added up without waiting for it.

    On a GPU a pair of events lies around each piece of work on the current stream; pairs are read once both have
    passed, steps later. On the CPU the time is the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.finished_ms = 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time of what is launched inside."""
        if not self.is_gpu:
            started = time.perf_counter()
            yield
            self.finished_ms += (time.perf_counter() - started) * 1e3
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.pending.append((start, end))
        while self.pending and self.pending[0][1].query():
            self._take_first()

    def total_ms(self) -> float:
        """The sum so far; waits for the device."""
        while self.pending:
            self.pending[0][1].synchronize()
            self._take_first()
        return self.finished_ms

    def reset(self) -> None:
        self.pending.clear()
        self.finished_ms = 0.0

    def _take_first(self) -> None:
        start, end = self.pending.popleft()
        self.finished_ms += start.elapsed_time(end)


class SelectionStats:
    """Sums over all chunks since the last `reset`. Adding never waits for the device."""

    def __init__(self, num_q_heads: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            # float64 counts blocks exactly: a layer lists more than 2^24 of them within a few long prompts.
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.listed_blocks = zeros(num_q_heads)
        """[num_q_heads]: blocks that each head read."""
        self.causal_blocks = zeros()
        """Blocks that dense attention would have read, per head."""
        self.density = Mean(num_q_heads, device)
        """Of chunks and requests, for the least; the mean is by blocks."""
        self.query_aware = zeros(num_q_heads)
        """[num_q_heads]: chunks whose blocks were selected query by query instead of by columns and diagonals."""
        self.divergence = zeros(num_q_heads)
        """[num_q_heads]: sum over chunks of sqrt(Jensen-Shannon divergence)."""
        self.chunks = 0
        """Chunks of requests that were selected for."""
        self.kept = Mean(num_q_heads, device)
        """What the rows that chose kept, per span of query tiles."""
        self.measured = Mean(num_q_heads, device)
        """What other rows kept, per row."""
        self.measured_rows = 0
        self.time = DeviceTime(device)
        """Of choosing blocks."""
        self.num_resets = 0

    @property
    def coverage(self) -> Mean:
        """The attention mass kept: of the measured rows where there are any, else of those that chose."""
        return self.measured if self.measured_rows > 0 else self.kept

    def add_selection(self, selection: FlexSelection, tiles: PrefillTiles, q_heads: slice) -> None:
        """Take in FlexPrefill's lists of one pass, which has the query heads `q_heads` of the layer."""
        self.add_lists(selection.block_lists, tiles, q_heads, selection.is_query_aware.shape[1])
        self.query_aware[q_heads] += selection.is_query_aware.sum(1)
        self.divergence[q_heads] += selection.divergence.sum(1)

    def add_tile_selection(
        self, selection: TileSelection, tiles: PrefillTiles, spans: Spans, q_heads: slice, num_requests: int
    ) -> None:
        """Take in the lists by tile rows of one pass, which has the query heads `q_heads` of the layer."""
        self.add_lists(selection.block_lists, tiles, q_heads, num_requests)
        self.kept.add(selection.kept, q_heads, spans.span_request >= 0)

    def add_lists(self, lists: BlockLists, tiles: PrefillTiles, q_heads: slice, num_requests: int) -> None:
        """Take in lists of one pass, which has the query heads `q_heads` of the layer."""
        per_list = (q_heads.stop - q_heads.start) // len(lists.block_counts)
        counts = lists.block_counts.double().repeat_interleave(per_list, 0)
        causal = (tiles.tile_block + 1).double()
        self.listed_blocks[q_heads] += counts.sum(1)
        self.density.add((counts.sum(1) / causal.sum())[:, None], q_heads)
        # Passes over the other heads of the same chunks see the same causal blocks.
        if q_heads.start == 0:
            self.causal_blocks += causal.sum()
            self.chunks += num_requests

    def add_coverage(self, coverage: torch.Tensor, q_heads: slice, has_choice: torch.Tensor | None = None) -> None:
        """Take in a measurement, [num_q_heads, num_requests, rows] in [0, 1], of the query heads `q_heads`.

        has_choice: [num_requests * rows] bool, the rows that count; all if None.
        """
        self.measured.add(coverage.flatten(1), q_heads, has_choice)
        if q_heads.start == 0:
            self.measured_rows += coverage.shape[1] * coverage.shape[2]

    def reset(self) -> None:
        """Forget everything."""
        for each in (self.listed_blocks, self.causal_blocks, self.query_aware, self.divergence):
            each.zero_()
        for mean in (self.density, self.kept, self.measured):
            mean.reset()
        self.time.reset()
        self.chunks = self.measured_rows = 0
        self.num_resets += 1

    def rows(self) -> list[dict[str, float | int | None]]:
        """One row per head; waits for the device. Nothing where no chunk was selected for.

        `density`: blocks read over causal blocks, `density_min`: of the sparsest pass; `coverage`, `coverage_min`: mean
        and least kept attention mass: of the measured rows where there are any, else of the spans of query tiles, by
        the rows that chose their blocks; None where neither is known. `query_aware`: share of the chunks; `divergence`:
        mean over chunks; both 0 where FlexPrefill's rule did not select. `selection_ms`: of the device per chunk, for
        all heads of the layer. `chunks`, `measured_rows`: counts.
        """
        if self.chunks == 0:
            return []
        coverage = self.coverage
        columns = {
            "density": self.listed_blocks / self.causal_blocks,
            "density_min": self.density.least,
            "coverage": coverage.total / coverage.count,
            "coverage_min": coverage.least,
            "query_aware": self.query_aware / self.chunks,
            "divergence": self.divergence / self.chunks,
        }
        values = torch.stack(list(columns.values()), dim=1).tolist()
        is_known = bool(coverage.count > 0)
        counts = {
            "selection_ms": self.time.total_ms() / self.chunks,
            "chunks": self.chunks,
            "measured_rows": self.measured_rows,
        }
        rows: list[dict[str, float | int | None]] = []
        for head, row in enumerate(values):
            named: dict[str, float | int | None] = dict(zip(columns, row, strict=True))
            if not is_known:
                named["coverage"] = named["coverage_min"] = None
            rows.append({"head": head, **named, **counts})
        return rows
