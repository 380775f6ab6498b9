"""The pass over the keys on Hopper against the portable kernel; a Gluon kernel does not run in the interpreter."""

from dataclasses import replace

import pytest
import torch
from farspan.kernels.flex import tile_rows
from farspan.kernels.flex.spans import SpanRule, Spans, make_spans
from farspan.kernels.rotary_turn import make_string_turn
from farspan.kernels.tuning import HopperLogSumsConfig, TileRowsConfig, hopper_log_sums_config

from tests.kernels.helpers import Inputs, make_batch

# By ending the process: a kernel that waits for a barrier for ever returns to no signal handler.
pytestmark = pytest.mark.timeout(120, method="thread")

BF16 = torch.bfloat16
Config = HopperLogSumsConfig | TileRowsConfig
FORM = HopperLogSumsConfig(num_stages=4)
PORTABLE = TileRowsConfig(64, 4, 2, use_tma=False)


@pytest.fixture
def hopper(device: torch.device) -> torch.device:
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("made for compute capability 9.0")
    return device


def draw(device: torch.device, query_lens: list[int], seq_lens: list[int], **options: object) -> Inputs:
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 128, "dtype": BF16} | options
    return make_batch(query_lens, seq_lens, device=device, sharpness=2.0, **shape)  # type: ignore[arg-type]


def log_sums(
    batch: Inputs, config: Config, rule: SpanRule, num_splits: int | None = None
) -> tuple[torch.Tensor, Spans]:
    """Log-sums [num_q_heads, num_spans, num_blocks, rows], NaN where nothing was written, and the spans."""
    tiles = batch.tiles(128)
    spans = make_spans(batch.query_start_loc.tolist(), batch.seq_lens.tolist(), tiles, rule)
    size = (batch.query.shape[1], spans.num_spans, tiles.max_kv_blocks, rule.rows_per_span)
    out = torch.full(size, float("nan"), device=batch.query.device)
    launch = tile_rows.LogSumsLaunch(
        batch.query, batch.kv.keys, batch.paged, spans, tiles.max_kv_blocks, 128, None, config, num_splits
    )
    launch(batch.query, batch.kv.keys, batch.scale, None, out)
    return out, spans


def assert_equal_log_sums(batch: Inputs, config: Config, rule: SpanRule, num_splits: int | None = None) -> None:
    found, spans = log_sums(batch, config, rule, num_splits)
    expected, _ = log_sums(batch, PORTABLE, rule)
    blocks = rule.span_len // 128
    for span, (request, index) in enumerate(zip(spans.span_request.tolist(), spans.span_index.tolist(), strict=True)):
        if request < 0:
            assert bool(found[:, span].isnan().all())
            continue
        own = slice(0, (index + 1) * blocks)
        torch.testing.assert_close(found[:, span, own], expected[:, span, own], atol=2e-4, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "dtype"),
    [(8, 128, BF16), (14, 64, BF16), (2, 128, torch.float16)],
    ids=["gqa4-d128", "gqa7-d64", "gqa1-d128-float16"],
)
def test_equal_to_the_portable_kernel(hopper: torch.device, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Of three requests one has spans that no program shares with another, one has none, one begins within a span."""
    batch = draw(hopper, [1700, 63, 900], [3700, 1063, 900], num_heads=num_heads, head_dim=head_dim, dtype=dtype)
    assert_equal_log_sums(batch, FORM, SpanRule(128, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 2, 7])
@pytest.mark.parametrize("rule", [SpanRule(256, 16), SpanRule(512, 32)], ids=["16of256", "32of512"])
def test_other_rules_and_splits(hopper: torch.device, rule: SpanRule, num_splits: int) -> None:
    assert_equal_log_sums(draw(hopper, [1700, 300], [3700, 2000]), FORM, rule, num_splits)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
def test_every_page_size(hopper: torch.device, page_size: int) -> None:
    assert_equal_log_sums(draw(hopper, [900, 300], [2000, 1063], page_size=page_size), FORM, SpanRule(128, 16))


@pytest.mark.gpu
def test_every_run_gives_the_same(hopper: torch.device) -> None:
    """Buffers are refilled while others are read; a missing barrier would show as a difference now and then."""
    batch = draw(hopper, [8000], [20000], num_heads=32, num_kv_heads=8)
    first, _ = log_sums(batch, FORM, SpanRule(128, 16))
    for _ in range(30):
        assert torch.equal(log_sums(batch, FORM, SpanRule(128, 16))[0].nan_to_num(7.0), first.nan_to_num(7.0))


def loud_batch(device: torch.device, query_len: int = 2300) -> Inputs:
    """The end of a prompt of 5,000 tokens, some keys of which weigh 2^200 times more or less than others."""
    torch.manual_seed(0)
    batch = draw(device, [2300], [5000])
    keys = batch.kv.keys
    loud = torch.rand(keys.shape[:3]) < 0.002
    loud[int(batch.block_table[0, 0]), :, 5] = True
    keys[loud.to(device)] *= 30
    start = torch.tensor([0, query_len], dtype=torch.int32, device=device)
    return replace(batch, query=batch.query[-query_len:].contiguous(), query_start_loc=start)


@pytest.mark.gpu
def test_scores_far_from_those_of_the_first_block(hopper: torch.device) -> None:
    """Rows whose blocks overflow or vanish beside the first one: right where a choice can tell, whatever the splits."""
    batch, rule = loud_batch(hopper), SpanRule(128, 16)
    found, spans = log_sums(batch, FORM, rule, 1)
    expected, _ = log_sums(batch, PORTABLE, rule)
    real = spans.span_request >= 0
    blocks = torch.arange(found.shape[2], device=hopper)
    own = (real[:, None] & (blocks <= spans.span_index[:, None]))[None, :, :, None].expand_as(found)
    first = expected[:, :, :1]
    assert bool((own & (expected > first + 128)).any())
    assert bool((own & (expected < first - 128)).any())
    near = own & (expected > first - 100)
    torch.testing.assert_close(found[near], expected[near], atol=1e-3, rtol=1e-5)
    assert bool((found < first - 99)[own & ~near].all())
    for num_splits in (2, 7):
        assert torch.equal(log_sums(batch, FORM, rule, num_splits)[0][own], found[own])


@pytest.mark.gpu
def test_the_same_in_every_chunk(hopper: torch.device) -> None:
    """Programs of the shorter chunk have other rows together, so that more or fewer of their blocks are masked."""
    rule = SpanRule(128, 16)
    (found, spans), (shorter, last_spans) = (
        log_sums(loud_batch(hopper, length), FORM, rule) for length in (2300, 1200)
    )
    places = {index: span for span, index in enumerate(spans.span_index.tolist()) if spans.span_request[span] >= 0}
    for span, (request, index) in enumerate(
        zip(last_spans.span_request.tolist(), last_spans.span_index.tolist(), strict=True)
    ):
        if request >= 0:
            assert torch.equal(shorter[:, span, : index + 1], found[:, places[index], : index + 1]), index


def chosen(**options: object) -> HopperLogSumsConfig | None:
    usual = {"head_dim": 128, "dtype": BF16, "capability": (9, 0), "block_size": 128, "page_size": 128}
    return hopper_log_sums_config(**(usual | {"rows_per_padded_spans": 1024} | options))  # type: ignore[arg-type]


def test_what_the_kernel_takes() -> None:
    assert chosen() is not None
    assert chosen(page_size=16) is not None
    refused: list[dict[str, object]] = [
        {"head_dim": 80},
        {"dtype": torch.float32},
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"block_size": 64},
        {"page_size": 48},
        {"rows_per_padded_spans": 320},
    ]
    for options in refused:
        assert chosen(**options) is None, options


def test_a_turn_takes_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_rows, "device_capability", lambda device: (9, 0))
    batch = draw(torch.device("cpu"), [300], [600])
    turn = make_string_turn(torch.ones(64), 5, 1, True, torch.device("cpu"))
    rule = SpanRule(256, 16)
    assert isinstance(tile_rows.log_sums_config(batch.query, batch.kv, rule, 128, None), HopperLogSumsConfig)
    assert isinstance(tile_rows.log_sums_config(batch.query, batch.kv, rule, 128, turn), TileRowsConfig)


def test_splits_fill_the_last_round() -> None:
    """64 programs use half of 132 multiprocessors, two splits of them nearly all; 128 programs need none."""
    assert FORM.num_splits(64, 1024) == 2
    assert FORM.num_splits(128, 1024) == 1
    assert FORM.num_splits(8, 64) == 16
    assert FORM.num_splits(8, 1) == 1
