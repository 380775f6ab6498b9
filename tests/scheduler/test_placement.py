"""How GPU and host memory are shared out, and the sentences where they do not suffice."""

from dataclasses import replace
from typing import Any

import pytest
from farspan.engine_ext.config import OffloadOptions
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError
from farspan.scheduler.capacity import KVLayout
from farspan.scheduler.placement import (
    GIB,
    EngineLimits,
    decide_sizes,
    running_limit,
)
from farspan.scheduler.residency import most_pages_written

HEAD_PAGE = 128 * 2 * 128 * 2


def layout(hot: int = 0) -> KVLayout:
    """An 8B model: 32 layers, 8 KV heads of 128, bfloat16."""
    return KVLayout(num_kv_heads=8, head_dim=128, element_bytes=2, page_size=128, hot_heads=(hot,) * 32, stub_bytes=256)


def limits(**changes: Any) -> EngineLimits:
    return EngineLimits(**{"max_model_len": 131072, "max_num_seqs": 16, "max_num_batched_tokens": 8192, **changes})


def test_a_million_tokens_in_two_gib() -> None:
    """The paper's case: one buffer of a head is 0.5 GiB at 1M tokens."""
    sizes = decide_sizes(
        OffloadOptions(host_memory=130), layout(), limits(max_model_len=1 << 20, max_num_batched_tokens=4096),
        gpu_bytes=int(2.1 * GIB), host_bytes=130 * GIB,
    )  # fmt: skip
    assert sizes.num_blocks == 130 * GIB // (16 << 20)
    assert sizes.group_size == 1
    assert sizes.staging_pages == 8192
    used = sizes.num_slots * (16 << 20) + 2 * 8192 * HEAD_PAGE + sizes.num_blocks * 32 * 256
    assert 2.05 * GIB < used <= 2.1 * GIB
    assert running_limit(sizes, 4096, 16) == (sizes.num_slots - 33) // 2 == 16


def test_a_million_tokens_in_half_a_gib() -> None:
    """What weights and activations of an 8B model leave of 17 GiB; the whole context of a head would take two."""
    sizes = decide_sizes(
        OffloadOptions(host_memory=129), layout(), limits(max_model_len=1 << 20, max_num_batched_tokens=512),
        gpu_bytes=GIB // 2, host_bytes=129 * GIB,
    )  # fmt: skip
    assert sizes.num_blocks == 129 * 64
    assert sizes.staging_pages * 128 >= 150_000
    assert sizes.num_slots >= 7
    used = sizes.num_slots * (16 << 20) + 2 * sizes.staging_pages * HEAD_PAGE + sizes.num_blocks * 32 * 256
    assert GIB // 2 - (16 << 20) < used <= GIB // 2


@pytest.mark.parametrize("hot", [0, 1, 4, 7])
@pytest.mark.parametrize("gpu_gib", [6, 20, 60])
def test_memory_is_not_spent_twice(hot: int, gpu_gib: int) -> None:
    for host_gib in (20, 60, 400):
        sizes = decide_sizes(
            OffloadOptions(host_memory=host_gib),
            layout(hot),
            limits(max_model_len=16384),
            gpu_gib * GIB,
            host_gib * GIB,
        )
        staging = 2 * sizes.group_size * sizes.staging_pages * HEAD_PAGE
        assert sizes.num_blocks * layout(hot).cold_block_bytes <= host_gib * GIB
        gpu = sizes.num_blocks * layout(hot).hot_block_bytes + sizes.num_slots * layout(hot).cold_block_bytes + staging
        assert gpu <= gpu_gib * GIB
        assert sizes.num_slots <= sizes.num_blocks
        running = running_limit(sizes, 8192, 16)
        assert 1 <= running <= 16
        if sizes.num_slots < sizes.num_blocks:
            assert most_pages_written(8192, running, 128) + 1 <= sizes.num_slots


def test_what_fits_has_no_staging() -> None:
    sizes = decide_sizes(OffloadOptions(host_memory=10), layout(), limits(max_model_len=8192), 60 * GIB, 10 * GIB)
    assert sizes.num_slots == sizes.num_blocks == 640
    assert sizes.staging_pages == 0
    assert running_limit(sizes, 8192, 1000) == 1000


def test_auto_takes_no_more_than_the_requests_can_use() -> None:
    sizes = decide_sizes(OffloadOptions(), layout(), limits(max_num_seqs=2), 8 * GIB, 400 * GIB)
    assert sizes.num_blocks == 2 * 1024 + 1


def test_group_size() -> None:
    for group, expected in (("auto", 8), (3, 3), (64, 8)):
        options = OffloadOptions(host_memory=40, group_size=group)  # type: ignore[arg-type]
        assert decide_sizes(options, layout(), limits(), 30 * GIB, 40 * GIB).group_size == expected


def test_short_requests_take_larger_groups() -> None:
    """A million tokens of 32 layers in 24 GB: one head at a time, and more of shorter requests as far as that pays."""
    few = limits(max_model_len=1 << 20, max_num_seqs=1)
    sizes = decide_sizes(OffloadOptions(host_memory=129), layout(), few, 4 * GIB, 129 * GIB)
    assert (sizes.group_size, sizes.staging_pages) == (1, 8192)
    # 43K tokens: 32 launches of the smaller group take as long as the bus for four heads' pages.
    assert [group for _, group in sizes.larger_groups] == [8, 4, 2]
    most = [pages for pages, _ in sizes.larger_groups]
    assert most[0] == pytest.approx(340, rel=0.01)
    assert most[1] == pytest.approx(4 * most[0], rel=0.01)
    assert most[2] == 4096, "as much as a buffer holds"
    assert [sizes.group_for(pages) for pages in (1, most[0], most[0] + 1, 1024, 4096, 4097)] == [8, 8, 4, 4, 2, 1]
    fixed = decide_sizes(OffloadOptions(host_memory=129, group_size=1), layout(), few, 4 * GIB, 129 * GIB)
    assert fixed.group_for(1) == 1


def test_blocks_that_the_user_names_come_before_slots() -> None:
    options, few = OffloadOptions(host_memory=40), limits(max_model_len=16384, max_num_seqs=1)
    freely = decide_sizes(options, layout(4), few, 6 * GIB, 40 * GIB)
    named = decide_sizes(options, layout(4), replace(few, num_blocks_override=680), 6 * GIB, 40 * GIB)
    assert named.num_blocks == 680 > freely.num_blocks
    assert named.num_slots < freely.num_slots
    with pytest.raises(ConfigError, match=r"override=4000; allowed: up to \d+ blocks, as 6\.00 GiB of GPU"):
        decide_sizes(options, layout(4), replace(few, num_blocks_override=4000), 6 * GIB, 400 * GIB)


def test_a_fitted_length_is_what_the_host_holds() -> None:
    sizes = decide_sizes(
        OffloadOptions(host_memory=20), layout(), limits(max_model_len=1 << 20, is_len_fitted=True), 10 * GIB, 20 * GIB
    )
    assert sizes.num_blocks == 1280
    assert sizes.staging_pages == 1279


def test_only_prompts_that_may_be_cut_otherwise_have_their_short_chunk_early() -> None:
    for changes, gpu_gib, expected in (({}, 2, True), ({"has_spans": False}, 2, False), ({}, 41, False)):
        sizes = decide_sizes(
            OffloadOptions(host_memory=40), layout(), limits(**changes), gpu_gib * GIB, host_bytes=40 * GIB
        )
        assert sizes.short_chunk_early == expected, changes


@pytest.mark.parametrize(
    ("changes", "gpu_gib", "host_gib", "sentence"),
    [
        ({}, 1, 40, "1.06 needed: 0.01 for 1025 blocks of hot heads, 1.05 for the 67 pages that a step of 8192 tokens"),
        ({}, 1, 40, "0.01 for two buffers that hold 1 KV heads of 8448 tokens, as a chunk needs. Lower --max-num-b"),
        ({"has_spans": False}, 1, 40, "1.18 needed"),
        ({"has_spans": False}, 1, 40, "max_model_len=131072, as only prefill.method 'dense' goes over a context in s"),
        ({}, 8, 10, "needs 1025 blocks of 128 tokens, 10.00 GiB of host memory a rank hold 640. Raise offload."),
        ({"num_blocks_override": 5000}, 8, 40, "num_gpu_blocks_override=5000; allowed: up to 2560 blocks"),
    ],
    ids=["gpu", "spans", "whole", "why-whole", "host", "override"],
)
def test_refusals(changes: dict[str, Any], gpu_gib: int, host_gib: int, sentence: str) -> None:
    with pytest.raises((ConfigError, UnsupportedEngineError)) as caught:
        decide_sizes(OffloadOptions(host_memory=40), layout(), limits(**changes), gpu_gib * GIB, host_gib * GIB)
    assert sentence in str(caught.value)


def test_hot_heads() -> None:
    assert OffloadOptions().hot_heads_per_layer(3, 8, 1) == (0, 0, 0)
    assert OffloadOptions(hot_heads=4).hot_heads_per_layer(2, 8, 2) == (2, 2)
    assert OffloadOptions(hot_heads=(2, 0)).hot_heads_per_layer(2, 2, 1) == (2, 0)
    # Two heads on four ranks: each has one of them.
    assert OffloadOptions(hot_heads=2).hot_heads_per_layer(1, 2, 4) == (1,)
    for options, ranks, sentence in (
        (OffloadOptions(hot_heads=9), 1, "up to 8, the KV heads"),
        (OffloadOptions(hot_heads=3), 2, "multiples of 2"),
        (OffloadOptions(hot_heads=(1, 2, 3)), 1, "one number for each of the model's 2 layers, not 3"),
    ):
        with pytest.raises(ConfigError) as caught:
            options.hot_heads_per_layer(2, 8, ranks)
        assert sentence in str(caught.value)
