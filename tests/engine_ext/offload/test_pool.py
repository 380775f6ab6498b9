"""Host memory for cold pages: whole layers in slabs, and sentences where there is none."""

import psutil
import pytest
import torch
from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.engine_ext.offload import pool
from farspan.engine_ext.offload.pool import GIB, LARGE_PAGE_BYTES, make_host_pool, make_slab, slab_members


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


@pytest.mark.parametrize("page_shape", [(5, 16, 128), (3, 16, 192), (2, 128, 256)], ids=["d64", "d96", "d128"])
def test_pages_begin_where_the_device_reads(page_shape: tuple[int, int, int]) -> None:
    """A GPU reads 128 bytes at a time; pages that begin between them are read at five sixths of the rate."""
    made = make_host_pool([2, 1], page_shape, torch.bfloat16, register=False)
    for layer in made.layers:
        for head in layer:
            assert [page.data_ptr() % 128 for page in head] == [0] * page_shape[0]
    assert made.slabs[0].data_ptr() % LARGE_PAGE_BYTES == 0
    assert made.num_bytes == 3 * 2 * page_shape[0] * page_shape[1] * page_shape[2]


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


@pytest.mark.gpu
def test_the_device_reads_and_writes_a_slab() -> None:
    made = make_host_pool([2], (3, 16, 128), torch.float16, register=True)
    (layer,) = made.layers
    layer.copy_(torch.randn(layer.shape))
    assert pool.device_address(layer.data_ptr()) == layer.data_ptr()
    with pytest.raises(UnsupportedEngineError, match="could not register"):
        make_slab(1 << 46, register=True)
