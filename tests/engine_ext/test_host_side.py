"""The host's part of a flex layer: few launches and torch operations, and nothing looked up twice in a step."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton.backends.nvidia.driver")


@pytest.fixture(scope="module")
def second_layer() -> dict[str, Any]:
    """What the second layer of a step does on the host."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.engine_ext.host_side_without_gpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_layer_makes_few_launches_and_operations(second_layer: dict[str, Any]) -> None:
    assert second_layer["kernels"] == [
        "_write_kv_kernel",
        "hopper_log_sums_kernel",
        "choice_kernel",
        "hopper_prefill_kernel",
    ]
    # The LSE, lists and workspaces of selection, and the views of keys and values.
    operations = second_layer["operations"]
    assert len(operations) <= 8, operations
    assert set(operations) <= {"aten.empty.memory_format", "aten.new_empty.default", "aten.slice.Tensor"}


def test_a_later_layer_launches_what_it_would_alone_and_looks_nothing_up(second_layer: dict[str, Any]) -> None:
    assert second_layer["looked_up"] == []
    assert second_layer["same_arguments"]
    assert min(second_layer["arguments"]) > 10
