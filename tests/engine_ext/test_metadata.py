"""From vLLM's batch to groups: the split, the padding, and what each group holds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext import metadata, requests
from farspan.engine_ext.config import DensePrefill, FlexPrefill, Prefill, parse_config
from farspan.engine_ext.metadata import FarspanMetadataBuilder, StepMetadata, count_decodes, shorten

DEVICE = torch.device("cpu")


class Source:
    """A batch whose requests have these extra args, in batch order."""

    def __init__(self, options: Any, extra_args: list[dict[str, Any] | None]) -> None:
        config = parse_config(options)
        self.rows = [requests.prefill_of_request(config, each) for each in extra_args]

    def prefills(self, common_attn_metadata: Any) -> list[Prefill]:
        return self.rows

    def plan(self) -> None:
        """No test looks at it."""

    def model(self) -> None:
        """No test looks at it."""


def build(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    options: Any = None,
    extra_args: list[dict[str, Any] | None] | None = None,
    monkeypatch: pytest.MonkeyPatch,
) -> StepMetadata:
    source = Source(options, [None] * len(query_lens) if extra_args is None else extra_args)
    monkeypatch.setattr(requests, "_make_source", lambda vllm_config: source)
    layer = SimpleNamespace(num_heads=4, impl=SimpleNamespace(shift_positions=lambda string: None))
    vllm_config = SimpleNamespace(
        additional_config={"farspan": options},
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        model_config=SimpleNamespace(max_model_len=4096),
    )
    spec = SimpleNamespace(num_kv_heads=2, head_size=64, dtype=torch.float32)
    builder = FarspanMetadataBuilder(spec, ["layer"], vllm_config, DEVICE)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    common = SimpleNamespace(
        causal=True,
        num_reqs=len(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
        block_table_tensor=torch.arange(len(query_lens) * 40, dtype=torch.int32).view(-1, 40),
    )
    return builder.build(0, common)


@pytest.mark.parametrize(
    ("query_lens", "decodes"),
    [([1, 1, 1], 3), ([1, 1, 7, 300], 2), ([5], 0), ([1, 0, 0], 3), ([2, 1], 0)],
    ids=["decodes", "mixed", "prefill", "padding", "unsorted"],
)
def test_count_decodes(query_lens: list[int], decodes: int) -> None:
    assert count_decodes(query_lens) == decodes


def test_all_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build([1, 1, 1], [5, 900, 1], monkeypatch=monkeypatch)
    assert step.num_decodes == 3
    assert step.prefill_groups == ()
    assert step.num_splits == 1


def test_mixed_batch_is_one_dense_group(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build([1, 1, 7, 300], [50, 129, 7, 1000], monkeypatch=monkeypatch)
    assert step.num_decodes == 2
    (group,) = step.prefill_groups
    assert group.prefill == DensePrefill()
    assert (group.token_start, group.num_tokens) == (2, 307)
    assert group.query_start_loc.tolist() == [0, 7, 307]
    assert group.seq_lens.tolist() == [7, 1000]
    assert group.block_table[:, 0].tolist() == [80, 120]
    assert (group.max_query_len, group.max_seq_len) == (300, 1000)
    assert group.tiles is None


def test_padding_behind_a_prefill_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build([1, 60, 0, 0], [9, 60, 0, 0], monkeypatch=monkeypatch)
    (group,) = step.prefill_groups
    assert group.num_tokens == 60
    assert group.seq_lens.tolist() == [60]


def test_overrides_and_short_prompts_split_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    flex = {"method": "flex", "gamma": 0.9, "min_seq_len": 500}
    extra_args = [None, {"farspan.gamma": 0.8}, None, {"farspan.method": "dense"}, None]
    step = build(
        [1, 200, 200, 300, 300],
        [600, 600, 200, 900, 1300],
        options={"prefill": flex},
        extra_args=extra_args,
        monkeypatch=monkeypatch,
    )
    first, dense, last = step.prefill_groups
    assert first.prefill == FlexPrefill(gamma=0.8, min_seq_len=500)
    assert dense.prefill == DensePrefill()
    assert last.prefill == FlexPrefill(gamma=0.9, min_seq_len=500)
    assert [group.token_start for group in step.prefill_groups] == [1, 201, 701]
    assert [group.request_ids.tolist() for group in step.prefill_groups] == [[0], [0, 1], [0]]
    assert dense.tiles is None
    # The last chunk covers positions [1000, 1300): tiles are aligned to the prompt, not to the chunk.
    assert last.tiles.tile_block.tolist() == [7, 8, 9, 10]
    assert last.tiles.tile_request.tolist() == [0, 0, 0, 0]


def test_block_sparse_tiles_have_its_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"prefill": {"method": "block_sparse", "block_size": 64}}
    (group,) = build([200], [200], options=options, monkeypatch=monkeypatch).prefill_groups
    assert group.tiles.block_size == 64
    assert group.tiles.num_tiles == 4


@pytest.mark.parametrize("kernel", ["triton", "fa3", "cpu"])
def test_requests_that_a_shift_leaves_alone_are_groups_without_it(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "string_shift_for_layer", lambda *arguments: SimpleNamespace(shift=100))
    monkeypatch.setattr(metadata, "choose_dense_kernel", lambda *arguments: kernel)
    # Of 100 tokens the last is 99 away from the first; of 101 it is 100 away.
    step = build(
        [60, 40, 41, 20], [60, 100, 101, 900], options={"string": {"shift": 100, "window": 16}}, monkeypatch=monkeypatch
    )
    near, shifted = step.prefill_groups
    assert (near.is_shifted, shifted.is_shifted) == (False, True)
    assert near.seq_lens.tolist() == [60, 100]
    assert shifted.seq_lens.tolist() == [101, 900]
    assert (near.tiles is not None) == (kernel == "triton")
    assert (shifted.tiles is not None) == (kernel != "cpu")


def test_crossover() -> None:
    assert shorten(FlexPrefill(), 100) == DensePrefill()
    assert shorten(FlexPrefill(), 100_000) == FlexPrefill()
    assert shorten(FlexPrefill(min_seq_len=0), 1) == FlexPrefill(min_seq_len=0)
