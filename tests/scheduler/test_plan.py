"""Plans are counted, immutable, and survive the trip to a worker process."""

import subprocess
import sys

import msgspec
import pytest
from farspan.engine_ext.plan import StepPlan


def test_round_trip() -> None:
    plan = StepPlan(step=7)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan
    with pytest.raises(AttributeError):
        plan.step = 8  # type: ignore[misc]


def test_needs_neither_torch_nor_vllm() -> None:
    check = (
        "import sys, farspan.scheduler, farspan.engine_ext.plan; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm')))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
