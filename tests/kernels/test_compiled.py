"""Registers and stack that kernels need on a Hopper GPU, measured by compiling them on any machine."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels import compile_for_hopper


@pytest.mark.skipif(not compile_for_hopper.CUOBJDUMP.exists(), reason="this build of Triton has no cuobjdump")
def test_kernels_keep_their_registers() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", compile_for_hopper.__name__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(run.stdout)
    # 256 threads of 128 registers are half of a multiprocessor's 65,536, so that two programs share it. With one more
    # register, heads of 64 lose a fifth of their speed.
    assert kernels["dense-d64"]["registers"] <= 128
    assert kernels["short-lists-d64"]["registers"] <= 128
    assert kernels["dense-d64"]["stack"] == 0
    # All registers are in use here, and one spilled number can cost more than 10 %.
    assert kernels["lists-d128"]["stack"] == 0
    # 384 threads share the registers of a multiprocessor until the roles divide them.
    for name in (each for each in kernels if each.startswith("hopper-")):
        assert kernels[name]["registers"] <= 168, name
        # Where a turn has a loop for each rotation, some numbers wait in memory until the loops are done.
        assert kernels[name]["stack"] <= (64 if name == "hopper-lists-turn-d128" else 0), name
    # 4 warps of 64 rows: two programs share a multiprocessor.
    for name in ("tile-rows-d128", "tile-rows-turn-d64", "tile-rows-choice"):
        assert kernels[name]["registers"] <= 255
        assert kernels[name]["stack"] == 0
    assert all(
        kernels[name]["stack"] == 0 for name in kernels if name.startswith(("map-", "move-", "stage-", "select-"))
    )
    # Three programs share a multiprocessor.
    for name in ("decode-drafts", "decode-fp8", "decode-fp8-drafts"):
        assert kernels[name]["registers"] <= 168
    assert all(kernels[name]["stack"] == 0 for name in kernels if name.startswith("decode-"))
    for name in ("write-fp8", "prefill-fp8", "tile-rows-fp8", "add-part"):
        assert kernels[name]["stack"] == 0
