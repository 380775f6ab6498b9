"""Host memory for cold pages: whole layers in slabs, and sentences where there is none."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.engine_ext.offload import pool
from farspan.engine_ext.offload.pool import (
    GIB,
    LARGE_PAGE_BYTES,
    make_host_pool,
    make_slab,
    register_slabs,
    slab_members,
)


def test_layers_share_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SLAB_BYTES", 3 * 2 * 5 * 4 * 8 * 2)
    made = make_host_pool([2, 1, 3, 8], (5, 4, 8), torch.bfloat16, register=False)
    assert [tuple(layer.shape) for layer in made.layers] == [(heads, 5, 4, 8) for heads in (2, 1, 3, 8)]
    assert all(layer.is_contiguous() and layer.dtype == torch.bfloat16 for layer in made.layers)
    assert len(made.slabs) == 2
    assert made.num_bytes == 14 * 5 * 4 * 8 * 2
    for number, layer in enumerate(made.layers):
        layer.fill_(number)
    assert [layer.float().mean().item() for layer in made.layers] == [0, 1, 2, 3]


def test_slabs() -> None:
    assert slab_members([3 * GIB, 3 * GIB, 3 * GIB, 20 * GIB, GIB]) == [[0, 1], [2], [3], [4]]
    with pytest.raises(UnsupportedEngineError, match=r"one layer take 65 GiB of host memory; farspan supports 64\."):
        slab_members([65 * GIB])


@pytest.mark.parametrize("page_shape", [(5, 16, 128), (3, 16, 192), (2, 128, 256)], ids=["d64", "d96", "d128"])
def test_pages_begin_where_the_device_reads(page_shape: tuple[int, int, int]) -> None:
    """A GPU reads 128 bytes at a time; pages that begin between them are read at five sixths of the rate."""
    made = make_host_pool([2, 1], page_shape, torch.bfloat16, register=False)
    for layer in made.layers:
        for head in layer:
            assert [page.data_ptr() % 128 for page in head] == [0] * page_shape[0]
    assert made.slabs[0].data_ptr() % LARGE_PAGE_BYTES == 0
    assert made.num_bytes == 3 * 2 * page_shape[0] * page_shape[1] * page_shape[2]


@pytest.mark.faults
def test_no_memory() -> None:
    with pytest.raises(UnsupportedEngineError, match=r"could not be allocated .* Lower offload\.host_memory"):
        make_slab(1 << 60)


def test_populated_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "POPULATED_BYTES", 16 << 20)
    slab = torch.empty(100 << 20, dtype=torch.uint8)
    gc.collect()  # what other tests left may not go meanwhile
    before = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(2) as threads:
        assert len(pool.populate(slab, threads)) == 7
    assert psutil.Process().memory_info().rss - before > 90 << 20
    slab.fill_(7)
    with ThreadPoolExecutor(2) as threads:
        pool.populate(slab[1:], threads)
        pool.populate(slab[3:9], threads)
    assert (slab == 7).all()


class FakeDriver:
    """CUDA's runtime as far as slabs need it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int = -1) -> None:
        """fails: number of the first call that does."""
        self.registered: dict[int, int] = {}
        """Bytes by address."""
        self.resident: list[int] = []
        """Bytes of the process, at each call."""
        self.fails = fails
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
        monkeypatch.setattr(pool, "device_address", lambda address: address)

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.resident.append(psutil.Process().memory_info().rss)
        if len(self.resident) > self.fails >= 0:
            return 2
        self.registered[address] = num_bytes
        # So long, once, that all that is to be populated is.
        time.sleep(0.5 if len(self.resident) == 1 else 0)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_slabs_are_populated_while_others_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    slabs = [make_slab((40 + number) << 20) for number in range(3)]
    before = psutil.Process().memory_info().rss
    told: list[float] = []
    register_slabs(slabs, told.append)
    first, second, _ = (resident - before >> 20 for resident in driver.resident)
    assert first > 38, "registered before it was populated"
    assert second > 38 + 39 + 40, "the third waited for the first"
    assert list(driver.registered.items()) == [(slab.data_ptr(), slab.numel()) for slab in slabs]
    assert told == [40 / 123, 81 / 123, 1]
    slabs.clear()
    assert not driver.registered


@pytest.mark.faults
def test_another_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    monkeypatch.setattr(pool, "device_address", lambda address: address + 4096)
    with pytest.raises(UnsupportedEngineError, match=r"other addresses than the host; .* Leave out offload\."):
        register_slabs([make_slab(1 << 20)], lambda share: None)
    assert len(driver.resident) == 1


@pytest.mark.faults
def test_no_lockable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered is given back, and what was to come is not populated."""
    driver = FakeDriver(monkeypatch, fails=1)
    monkeypatch.setattr(pool, "MAX_THREADS", 1)
    monkeypatch.setattr(pool.ctypes, "CDLL", lambda name: SlowMemory())
    slabs = [make_slab(1 << 20) for _ in range(40)]
    with pytest.raises(UnsupportedEngineError, match=r"could not register .* ulimit -l, is .* raise the limit"):
        register_slabs(slabs, lambda share: None)
    assert len(driver.resident) == 2
    assert SlowMemory.calls < 30
    slabs.clear()
    assert not driver.registered


class SlowMemory:
    """A libc whose `madvise` takes its time."""

    calls = 0

    class Call:
        argtypes: tuple[object, ...] = ()

        def __call__(self, start: int, num_bytes: int, advice: int) -> int:
            if advice == pool.MADV_POPULATE_WRITE:
                SlowMemory.calls += 1
                time.sleep(0.05)
            return 0

    madvise = Call()


@pytest.mark.gpu
def test_the_device_reads_and_writes_a_slab() -> None:
    made = make_host_pool([2], (3, 16, 128), torch.float16, register=True)
    (layer,) = made.layers
    layer.copy_(torch.randn(layer.shape))
    assert pool.device_address(layer.data_ptr()) == layer.data_ptr()
    with pytest.raises(UnsupportedEngineError, match="could not register"):
        register_slabs(made.slabs, lambda share: None)  # once more
