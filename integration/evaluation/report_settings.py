"""What `farspan report` is asked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ReportSettings:
    """What to report on; see `farspan report --help`."""

    out: Path
    model: str = "needle"
    length: int = 8192
    """Prompt tokens."""
    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    chunk: int = 0
    """Prompt tokens a step; 0 for the whole prompt."""
    seed: int = 0
    from_csv: tuple[Path, ...] = ()
    """Tables to draw instead of running a model."""
    count: int = 4
    """Of other models than needle: questions of each point of accuracy against density; also the following ones."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    chat_template: bool = True
    haystack: tuple[Path, ...] = ()
