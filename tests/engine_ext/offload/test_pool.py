"""Host memory for cold pages: whole layers in slabs, and sentences where there is none."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.engine_ext.offload import pool
from farspan.engine_ext.offload.pool import GIB, make_host_pool, make_slab, slab_members


def test_layers_share_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SLAB_BYTES", 3 * 2 * 5 * 4 * 8 * 2)
    told: list[float] = []
    made = make_host_pool([2, 1, 3, 8], (5, 4, 8), torch.bfloat16, register=False, progress=told.append)
    assert [tuple(layer.shape) for layer in made.layers] == [(heads, 5, 4, 8) for heads in (2, 1, 3, 8)]
    assert all(layer.is_contiguous() and layer.dtype == torch.bfloat16 for layer in made.layers)
    assert len(made.slabs) == 2
    assert told == [6 / 14, 1.0]
    assert made.num_bytes == 14 * 5 * 4 * 8 * 2
    for number, layer in enumerate(made.layers):
        layer.fill_(number)
    assert [layer.float().mean().item() for layer in made.layers] == [0, 1, 2, 3]


def test_slabs() -> None:
    assert slab_members([3 * GIB, 3 * GIB, 3 * GIB, 20 * GIB, GIB]) == [[0, 1], [2], [3], [4]]
    with pytest.raises(UnsupportedEngineError, match=r"one layer take 65 GiB of host memory; farspan supports 64\."):
        slab_members([65 * GIB])


def test_no_memory() -> None:
    with pytest.raises(UnsupportedEngineError, match=r"could not be allocated .* Lower offload\.host_memory"):
        make_slab(1 << 60, register=False)


def test_populated_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POPULATED_BYTES", 16 << 20)
    slab = torch.empty(100 << 20, dtype=torch.uint8)
    before = psutil.Process().memory_info().rss
    pool.populate(slab)
    assert psutil.Process().memory_info().rss - before > 90 << 20
    slab.fill_(7)
    pool.populate(slab[1:])
    pool.populate(slab[3:9])
    assert (slab == 7).all()


def test_processors_near_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert pool.cpus_of("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert pool.cpus_of("\n") == set()
    allowed = os.sched_getaffinity(0)
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xB3, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    asked: list[str] = []
    for told, expected in (
        (f"{min(allowed)},4096", {min(allowed)}),
        ("4096-4100", allowed),
        ("", allowed),
        ("?", allowed),
    ):

        def read(path: str, told: str = told) -> Any:
            asked.append(path)
            return SimpleNamespace(read_text=lambda: told)

        monkeypatch.setattr(pool, "Path", read)
        assert pool.near_cpus() == expected
    assert asked[0] == "/sys/bus/pci/devices/0000:b3:00.0/local_cpulist"
    monkeypatch.setattr(pool, "Path", lambda path: tmp_path / "none")
    assert pool.near_cpus() == allowed
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.gpu
def test_the_device_reads_and_writes_a_slab() -> None:
    made = make_host_pool([2], (3, 16, 128), torch.float16, register=True)
    (layer,) = made.layers
    layer.copy_(torch.randn(layer.shape))
    assert pool.device_address(layer.data_ptr()) == layer.data_ptr()
    with pytest.raises(UnsupportedEngineError, match="could not register"):
        make_slab(1 << 46, register=True)
