"""Launches that find their compiled kernel once."""

from typing import Any

import pytest
import torch
from farspan.kernels import repeated_launch
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.repeated_launch import RepeatedLaunch

from tests.kernels.helpers import make_batch


class Compiled:
    """Stands for a compiled kernel; notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append((grid, *arguments))


class Kernel:
    """Stands for a function made by `triton.jit`; notes its calls."""

    def __init__(self) -> None:
        self.compiled = Compiled()
        self.calls: list[tuple[object, ...]] = []

    @staticmethod
    def fn(x_ptr: object, number: int, y_ptr: object, BLOCK: int) -> None:
        pass

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: object, **options: int) -> Compiled:
            self.calls.append((grid, *arguments, options))
            return self.compiled

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(repeated_launch, "CompiledKernel", Compiled)
    return Kernel()


def launch_of(kernel: Any) -> RepeatedLaunch:
    return RepeatedLaunch(kernel, (5,), ("y_ptr", "x_ptr"), {"number": 3, "BLOCK": 64}, num_warps=4)


def test_the_second_call_takes_the_compiled_kernel(kernel: Kernel) -> None:
    launch, tensors = launch_of(kernel), [torch.empty(4) for _ in range(4)]
    launch(tensors[0], tensors[1])
    launch(tensors[2], tensors[3])
    launch(tensors[2], None)
    assert kernel.calls == [((5, 1, 1), tensors[1], 3, tensors[0], 64, {"num_warps": 4})]
    assert kernel.compiled.calls == [
        ((5, 1, 1), tensors[3], 3, tensors[2], 64),
        ((5, 1, 1), None, 3, tensors[2], 64),
    ]


def test_unaligned_tensors_take_tritons_own_way(kernel: Kernel) -> None:
    """Its kernel for aligned pointers would read past them, or fault."""
    launch, aligned = launch_of(kernel), torch.empty(8)
    launch(aligned[1:], aligned)
    launch(aligned, aligned)
    launch(aligned, aligned[1:])
    launch(aligned, aligned)
    assert len(kernel.calls) == 3
    assert len(kernel.compiled.calls) == 1


def test_every_parameter_has_a_value(kernel: Kernel) -> None:
    with pytest.raises(AssertionError, match="BLOCK"):
        RepeatedLaunch(kernel, (5,), ("y_ptr", "x_ptr"), {"number": 3})


def test_a_batch_keeps_a_launch_for_each_way_to_compute_it(device: torch.device) -> None:
    """Layers use a batch's launches again, with any scale; other tiles or a mask have launches of their own."""
    inputs = make_batch([30, 40], [50, 90], head_dim=16, device=device)
    shared = inputs.paged
    tiles, first = inputs.tiles(64), inputs.tiles(64, requests=[0])
    for each, scale, causal in [(tiles, 0.2, True), (first, 0.2, True), (tiles, 0.3, True), (tiles, 0.2, False)] * 2:
        outs = []
        for paged in (shared, inputs.paged):
            out = torch.zeros_like(inputs.query)
            paged_prefill(inputs.query, inputs.kv, paged, each, scale, causal=causal, out=out)
            outs.append(out)
        assert torch.equal(*outs)
    assert len(shared.launches) == 2


@pytest.mark.gpu
def test_layers_that_repeat_a_launch_write_their_own_tensors() -> None:
    from farspan.kernels.kv_write import write_kv

    key, slots = torch.randn(7, 2, 64, device="cuda"), torch.arange(7, device="cuda")
    caches = [torch.zeros(1, 2, 16, 128, device="cuda") for _ in range(3)]
    for layer, cache in enumerate(caches):
        write_kv(key + layer, key - layer, cache, slots)
    for layer, cache in enumerate(caches):
        assert torch.equal(cache[0, :, :7, :64].transpose(0, 1), key + layer)
        assert torch.equal(cache[0, :, :7, 64:].transpose(0, 1), key - layer)
