"""What the dynamic selection of one layer chose and kept, added up on the device; read only when somebody asks."""

import torch
from farspan.kernels.flex.types import FlexSelection
from farspan.kernels.tiles import PrefillTiles


class SelectionStats:
    """Sums over all chunks since the last `reset`. Adding never waits for the device."""

    def __init__(self, num_q_heads: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            # float64 counts blocks exactly: a layer lists more than 2^24 of them within a few long prompts.
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.listed_blocks = zeros(num_q_heads)
        """[num_q_heads]: blocks that each head read, those of heads that were computed again included."""
        self.causal_blocks = zeros()
        """Blocks that dense attention would have read, per head."""
        self.query_aware = zeros(num_q_heads)
        """[num_q_heads]: chunks whose blocks were selected query by query instead of by columns and diagonals."""
        self.divergence = zeros(num_q_heads)
        """[num_q_heads]: sum over chunks of sqrt(Jensen-Shannon divergence)."""
        self.chunks = 0
        """Chunks of requests that were selected for."""
        self.coverage = zeros(num_q_heads)
        """[num_q_heads]: sum of the kept attention mass over the measured rows."""
        self.measured_rows = 0
        self.repaired = zeros(num_q_heads)
        """[num_q_heads]: chunks in which the head was computed again over all its keys."""

    def add_selection(self, selection: FlexSelection, tiles: PrefillTiles, q_heads: slice) -> None:
        """Take in the lists of one pass, which has the query heads `q_heads` of the layer."""
        num_heads, num_requests = selection.is_query_aware.shape
        counts = selection.block_lists.block_counts.sum(1)
        self.listed_blocks[q_heads] += counts.repeat_interleave(num_heads // len(counts))
        self.query_aware[q_heads] += selection.is_query_aware.sum(1)
        self.divergence[q_heads] += selection.divergence.sum(1)
        # Passes over the other heads of the same chunks see the same causal blocks.
        if q_heads.start == 0:
            self.causal_blocks += tiles.tile_block.sum() + tiles.num_tiles
            self.chunks += num_requests

    def add_coverage(self, coverage: torch.Tensor, q_heads: slice) -> None:
        """Take in a measurement, [num_q_heads, num_requests, rows] in [0, 1], of the query heads `q_heads`."""
        self.coverage[q_heads] += coverage.sum((1, 2))
        if q_heads.start == 0:
            self.measured_rows += coverage.shape[1] * coverage.shape[2]

    def add_repair(self, heads: torch.Tensor, tiles: PrefillTiles, q_heads: slice) -> None:
        """Take in the heads of `q_heads` that were computed again, [num_q_heads, num_requests] bool.

        tiles: of the requests.
        """
        self.listed_blocks[q_heads] += (heads[:, tiles.tile_request.long()] * (tiles.tile_block + 1)).sum(1)
        self.repaired[q_heads] += heads.sum(1)

    def reset(self) -> None:
        """Forget everything."""
        sums = (self.listed_blocks, self.causal_blocks, self.query_aware, self.divergence, self.coverage, self.repaired)
        for each in sums:
            each.zero_()
        self.chunks = self.measured_rows = 0

    def rows(self) -> list[dict[str, float | int | None]]:
        """One row per head; waits for the device. Nothing where no chunk was selected for.

        `density`: blocks read over causal blocks, where a head that was computed again read its list and all of them;
        `query_aware`: share of the chunks; `divergence`: mean over chunks; `coverage`: mean kept attention mass after
        repair, None where it was not measured; `repaired`: share of the chunks; `chunks`, `measured_rows`: counts.
        """
        if self.chunks == 0:
            return []
        columns = {
            "density": self.listed_blocks / self.causal_blocks,
            "query_aware": self.query_aware / self.chunks,
            "divergence": self.divergence / self.chunks,
            "coverage": self.coverage / max(self.measured_rows, 1),
            "repaired": self.repaired / self.chunks,
        }
        values = torch.stack(list(columns.values()), dim=1).tolist()
        rows: list[dict[str, float | int | None]] = []
        for head, row in enumerate(values):
            named: dict[str, float | int | None] = dict(zip(columns, row, strict=True))
            if self.measured_rows == 0:
                named["coverage"] = None
            rows.append({"head": head, **named, "chunks": self.chunks, "measured_rows": self.measured_rows})
        return rows
