"""The worker's side of `farspan audit`: coverage by head and by chunk, and a switch that turns measuring off."""

from typing import Any

import torch
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.metrics import SelectionMetrics
from farspan.vllm_compat.runner import metadata_builders


class AuditStats(SelectionStats):
    """Statistics that also keep what each head kept in each chunk; for few prompts, since they grow with the chunks."""

    def __init__(self, num_q_heads: int, device: torch.device) -> None:
        super().__init__(num_q_heads, device)
        self.by_chunk: list[tuple[slice, torch.Tensor]] = []

    def add_coverage(self, coverage: torch.Tensor, q_heads: slice, has_choice: torch.Tensor | None = None) -> None:
        """See `SelectionStats.add_coverage`."""
        super().add_coverage(coverage, q_heads, has_choice)
        counts = torch.ones_like(coverage[0])
        if has_choice is not None:
            counts = has_choice.view_as(coverage[0]).to(coverage.dtype)
        # 0 / 0 where no row of a request's chunk counts.
        self.by_chunk.append((q_heads, (coverage * counts).sum(2) / counts.sum(1)))

    def reset(self) -> None:
        """See `SelectionStats.reset`."""
        super().reset()
        self.by_chunk.clear()

    def rows(self) -> list[dict[str, Any]]:
        """As those of `SelectionStats`, with `chunk_coverage`: of each chunk with rows that count."""
        rows: list[dict[str, Any]] = [{**row, "chunk_coverage": []} for row in super().rows()]
        for heads, coverage in self.by_chunk if rows else ():
            for head, values in zip(range(heads.start, heads.stop), coverage.tolist(), strict=True):
                rows[head]["chunk_coverage"] += [value for value in values if value == value]
        return rows


class AuditMetrics(SelectionMetrics):
    """Mixed into vLLM's workers by `worker_extension_cls`; `farspan.metrics.read_selection` reads its rows."""

    def farspan_audit(self, measures: bool) -> None:
        """Start statistics by chunk anew, or keep none, so that a request takes the time that it takes elsewhere."""
        worker: Any = self
        for builder in metadata_builders(worker.model_runner):
            for layer in builder.layers.values():
                assert layer.selector is not None, "an audit's engine prefills by flex"
                layer.selector.stats = None
                if measures:
                    num_q_heads = worker.model_config.get_num_attention_heads(worker.parallel_config)
                    layer.selector.stats = AuditStats(num_q_heads, builder.device)
