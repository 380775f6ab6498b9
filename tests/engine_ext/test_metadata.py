"""From vLLM's batch to passes: the split, the padding, and what each pass holds."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from farspan.engine_ext import layers, metadata, requests
from farspan.engine_ext.config import DensePrefill, FlexPrefill, Prefill, parse_config
from farspan.engine_ext.metadata import FarspanMetadataBuilder
from farspan.engine_ext.pass_maker import effective_prefill
from farspan.engine_ext.passes import Decode, Dense, Sparse, StepMetadata
from farspan.engine_ext.runs import count_decodes
from farspan.engine_ext.selection.crossover import AttentionSize
from farspan.kernels.flex.spans import Spans
from farspan.kernels.rotary_turn import make_string_turn

DEVICE = torch.device("cpu")
# Two layers of the second stage of a pipeline.
NAMES = {"model.layers.7.self_attn.attn": (7, None), "model.layers.6.self_attn.attn": (6, 7)}


class Source:
    """A batch whose requests have these extra args, in batch order."""

    def __init__(self, options: Any, extra_args: list[dict[str, Any] | None]) -> None:
        config = parse_config(options)
        self.rows = [requests.prefill_of_request(config, each) for each in extra_args]

    def prefills(self, common_attn_metadata: Any) -> list[Prefill]:
        return self.rows

    def missing(self, common_attn_metadata: Any) -> list[bool]:
        return [False] * common_attn_metadata.num_reqs

    def cold_cache(self) -> None:
        return None

    def prompt_lens(self, common_attn_metadata: Any) -> list[int | None]:
        return [2500 if seq_len == 2000 else None for seq_len in common_attn_metadata.seq_lens.tolist()]

    def shards(self, common_attn_metadata: Any) -> list[None]:
        return [None] * len(self.rows)

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
    num_drafts: int | None = None,
    monkeypatch: pytest.MonkeyPatch,
) -> StepMetadata:
    source = Source(options, [None] * len(query_lens) if extra_args is None else extra_args)
    monkeypatch.setattr(requests, "_make_source", lambda vllm_config: source)
    vllm_config = SimpleNamespace(
        additional_config={"farspan": options},
        parallel_config=SimpleNamespace(worker_extension_cls=""),
        model_config=SimpleNamespace(max_model_len=4096, get_num_attention_heads=lambda parallel: 4),
        speculative_config=None if num_drafts is None else SimpleNamespace(num_speculative_tokens=num_drafts),
    )
    spec = SimpleNamespace(num_kv_heads=2, head_size=64, dtype=torch.float32, block_size=128)
    builder = FarspanMetadataBuilder(spec, list(NAMES), vllm_config, DEVICE)
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
    (each,) = step.passes
    assert isinstance(each.work, Decode)
    assert each.rows == slice(0, 3)
    assert each.kv_heads == slice(0, 2)
    assert each.batch.kv_lens.tolist() == [5, 900, 1]
    assert each.batch.max_kv_len == 900
    assert not each.turns


def test_drafts_decode_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with up to all drafts lead; what is longer prefills, and a short chunk behind it is exact."""
    options = {"prefill": {"method": "block_sparse"}}
    step = build([5, 1, 3, 6, 4], [50, 129, 7, 1000, 4], options=options, num_drafts=4, monkeypatch=monkeypatch)
    decode, sparse, dense = step.passes
    assert isinstance(decode.work, Decode)
    assert decode.work.query_len == 5
    assert decode.rows == slice(0, 9)
    assert decode.batch.query_start_loc.tolist() == [0, 5, 6, 9]
    assert decode.batch.kv_lens.tolist() == [50, 129, 7]
    assert isinstance(sparse.work, Sparse)
    assert (sparse.rows, dense.rows) == (slice(9, 15), slice(15, 19))
    assert dense.work == Dense("cpu", None)


def test_drafts_of_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a graph have as many tokens each; without drafts in a step they have the rows of their numbers."""
    (decode,) = build([3, 3], [50, 129], num_drafts=2, monkeypatch=monkeypatch).passes
    assert isinstance(decode.work, Decode)
    assert (decode.rows, decode.work.query_len) == (slice(0, 6), 3)
    (decode,) = build([1, 1, 0], [50, 129, 0], num_drafts=2, monkeypatch=monkeypatch).passes
    assert isinstance(decode.work, Decode)
    assert (decode.rows, decode.work.query_len) == (slice(0, 3), 1)


def test_layers_know_their_place_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are numbered by their names, since a pipeline stage begins in the middle and has other modules too."""
    step = build([1], [5], monkeypatch=monkeypatch)
    assert {name: (layer.index, layer.next_index) for name, layer in step.layers.items()} == NAMES


def test_mixed_batch_is_a_decode_and_a_dense_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build([1, 1, 7, 300], [50, 129, 7, 1000], monkeypatch=monkeypatch)
    decode, prefill = step.passes
    assert decode.rows == slice(0, 2)
    assert decode.batch.num_reqs == 2
    assert prefill.work == Dense("cpu", None)
    assert prefill.rows == slice(2, 309)
    batch = prefill.batch
    assert batch.query_start_loc.tolist() == [0, 7, 307]
    assert batch.kv_lens.tolist() == [7, 1000]
    assert batch.block_table[:, 0].tolist() == [80, 120]
    assert (batch.max_query_len, batch.max_kv_len) == (300, 1000)
    assert batch.first_positions().tolist() == [0, 700]


def test_padding_after_a_prefill_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    step = build([1, 60, 0, 0], [9, 60, 0, 0], monkeypatch=monkeypatch)
    _, prefill = step.passes
    assert prefill.rows == slice(1, 61)
    assert prefill.batch.kv_lens.tolist() == [60]


def test_overrides_and_the_crossover_split_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    flex = {"method": "flex", "gamma": 0.9, "min_seq_len": 500, "min_chunk_len": 150, "coverage_rows": 4}
    extra_args = [None, {"farspan.gamma": 0.8}, None, {"farspan.method": "dense"}, None, None]
    step = build(
        [1, 200, 200, 300, 300, 149],
        [600, 600, 200, 900, 1300, 3000],
        options={"prefill": flex},
        extra_args=extra_args,
        monkeypatch=monkeypatch,
    )
    _, first, dense, sparse, small_chunk = step.passes
    options = FlexPrefill(gamma=0.9, min_seq_len=500, min_chunk_len=150, coverage_rows=4)
    assert isinstance(first.work, Sparse)
    assert isinstance(sparse.work, Sparse)
    assert first.work.prefill == msgspec.structs.replace(options, gamma=0.8)
    assert sparse.work.prefill == options
    assert [each.rows.start for each in step.passes] == [0, 1, 201, 701, 1001]
    assert isinstance(dense.work, Dense)
    assert isinstance(small_chunk.work, Dense)
    assert dense.batch.num_reqs == 2
    # The chunk covers positions [1000, 1300): tiles are aligned to the prompt, not to the chunk.
    assert sparse.work.tiles.tile_block.tolist() == [7, 8, 9, 10]
    assert sparse.work.tiles.tile_request.tolist() == [0, 0, 0, 0]
    # Positions 1024 to 1279 are two whole spans; the tiles around them read everything.
    assert sparse.work.spans is not None
    assert real_spans(sparse.work.spans, "span_tile") == [1, 2]
    assert sparse.work.spans.cut_tile.tolist() == [0, 3]
    samples = sparse.work.samples
    assert samples is not None
    assert samples.batch.kv_lens.tolist() == [1000 + row + 1 for row in samples.rows.tolist()]
    assert (samples.batch.block_table == sparse.batch.block_table).all()


def real_spans(spans: Spans, column: str) -> list[int]:
    """A column of the spans without padding."""
    values: list[int] = getattr(spans, column)[spans.span_request >= 0].tolist()
    return values


def test_block_sparse_tiles_have_its_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"prefill": {"method": "block_sparse", "block_size": 64}}
    (each,) = build([200], [200], options=options, monkeypatch=monkeypatch).passes
    assert isinstance(each.work, Sparse)
    assert each.work.tiles.block_size == 64
    assert each.work.tiles.num_tiles == 4
    assert each.work.samples is None
    # A named pattern's lists are the same for all layers, and made with the pass.
    assert each.work.lists is not None
    assert each.work.lists.block_counts.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("kernel", "kernels"),
    [("triton", ["triton", "triton"]), ("fa3", ["fa3", "triton"]), ("cpu", ["cpu", "cpu"])],
    ids=["triton", "fa3", "cpu"],
)
def test_requests_that_a_turn_does_not_reach_are_passes_without_it(
    kernel: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = make_string_turn(torch.ones(32), 100, 16, True, DEVICE)
    monkeypatch.setattr(layers, "string_turn_for_layer", lambda *arguments: turn)
    monkeypatch.setattr(metadata, "choose_dense_kernel", lambda *arguments: kernel)
    # Of 100 tokens the last is 99 away from the first; of 101 it is 100 away.
    step = build(
        [60, 40, 41, 20], [60, 100, 101, 900], options={"string": {"shift": 100, "window": 16}}, monkeypatch=monkeypatch
    )
    near, turned = step.passes
    assert (near.turns, turned.turns) == (False, True)
    assert near.batch.kv_lens.tolist() == [60, 100]
    assert turned.batch.kv_lens.tolist() == [101, 900]
    assert [each.work.kernel for each in step.passes] == kernels
    assert [each.work.tiles is not None for each in step.passes] == [name == "triton" for name in kernels]


def test_min_seq_len_is_held_against_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not against where its chunk ends."""
    flex = {"method": "flex", "min_seq_len": 2300, "min_chunk_len": 0}
    step = build([600, 600], [2000, 2001], options={"prefill": flex}, monkeypatch=monkeypatch)
    sparse, dense = step.passes
    assert isinstance(sparse.work, Sparse)
    assert isinstance(dense.work, Dense)
    assert sparse.batch.kv_lens.tolist() == [2000]


def test_the_selection_decides_whether_there_are_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    always = {"method": "flex", "min_seq_len": 0, "min_chunk_len": 0}
    (each,) = build([1400], [1500], options={"prefill": always}, monkeypatch=monkeypatch).passes
    assert isinstance(each.work, Sparse)
    assert each.work.samples is None
    assert each.work.spans is not None
    # Positions 128 to 1407 lie in the chunk in whole spans.
    assert real_spans(each.work.spans, "span_request") == [0] * 10
    assert real_spans(each.work.spans, "span_index") == list(range(1, 11))
    assert real_spans(each.work.spans, "span_row") == list(range(28, 1308, 128))
    assert each.work.spans.cut_tile.tolist() == [0, 11]
    always |= {"selection": "flexprefill"}
    (each,) = build([1400], [1500], options={"prefill": always}, monkeypatch=monkeypatch).passes
    assert isinstance(each.work, Sparse)
    assert each.work.spans is None


def test_crossover() -> None:
    def effective(prefill: FlexPrefill, query_len: int, kv_len: int, prompt_len: int | None = None) -> Prefill:
        return effective_prefill(prefill, query_len, kv_len, prompt_len, AttentionSize(32, 128))

    assert effective(FlexPrefill(), 100, 100) == DensePrefill()
    assert effective(FlexPrefill(), 100_000, 100_000) == FlexPrefill()
    # A turn of a chat on a long prefix.
    assert effective(FlexPrefill(), 200, 100_000) == DensePrefill()
    always = FlexPrefill(min_seq_len=0, min_chunk_len=0)
    assert effective(always, 1, 1) == always
    prompts = FlexPrefill(min_seq_len=5000)
    assert effective(prompts, 600, 1000, 5000) == prompts
    assert effective(prompts, 600, 1000, 4999) == DensePrefill()
    assert effective(FlexPrefill(min_chunk_len=600), 599, 100_000) == DensePrefill()
