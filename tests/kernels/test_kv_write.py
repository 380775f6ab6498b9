import pytest
import torch
from farspan.kernels.kv_write import write_kv

from tests.kernels.helpers import make_batch


@pytest.mark.parametrize("page_size", [16, 128], ids=lambda size: f"page{size}")
@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "dtype"),
    [(1, 64, torch.float32), (3, 96, torch.float16), (2, 128, torch.bfloat16), (8, 256, torch.float16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("layout", ["lbhnc", "lbnhc"])
def test_writes_exactly_the_slots(
    device: torch.device, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, layout: str
) -> None:
    batch = make_batch(
        [1, 0, page_size + 1],
        [page_size, 3, page_size + 5],
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        device=device,
        layout=layout,
    )
    expected = batch.kv_cache.clone()
    cache = batch.kv_cache.clone()
    pages, offsets = batch.slot_mapping // page_size, batch.slot_mapping % page_size
    cache[pages, :, offsets] = float("nan")
    write_kv(batch.key, batch.value, cache, batch.slot_mapping)
    assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_skips_padding_and_takes_strided_input(device: torch.device) -> None:
    num_tokens, num_kv_heads, head_dim = 5, 2, 64
    fused = torch.randn(num_tokens + 3, num_kv_heads, 3 * head_dim, device=device)
    key, value = fused[..., :head_dim], fused[..., 2 * head_dim :]
    cache = torch.zeros(2, num_kv_heads, 16, 2 * head_dim, device=device)
    slots = torch.tensor([17, -1, 0, -1, 31], device=device)
    write_kv(key, value, cache, slots)
    expected = torch.zeros_like(cache)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, :, slot % 16] = torch.cat([key[token], value[token]], dim=-1)
    assert torch.equal(cache, expected)


def test_empty_step_writes_nothing(device: torch.device) -> None:
    cache = torch.zeros(1, 1, 16, 128, device=device)
    empty = torch.zeros(0, 1, 64, device=device)
    write_kv(empty, empty, cache, torch.zeros(0, dtype=torch.int64, device=device))
    assert not bool(cache.any())
