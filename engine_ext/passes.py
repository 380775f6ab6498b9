"""One attention call as a value: built once per step, immutable, the same for all layers of a KV cache group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from farspan.engine_ext.config import BlockSparsePrefill, FlexPrefill
from farspan.engine_ext.plan import StepPlan
from farspan.engine_ext.selection.methods import Selector
from farspan.engine_ext.splits import SplitPlan
from farspan.engine_ext.star.exchange import Exchange
from farspan.engine_ext.star.keys import KeyExchange
from farspan.engine_ext.star.positions import Turns
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.decode_workspace import DecodeWorkspace
from farspan.kernels.flex.spans import Spans
from farspan.kernels.page_bounds import PageBounds
from farspan.kernels.page_choice import Rule
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.selected_decode import SelectionBuffers
from farspan.kernels.tiles import BlockLists, PrefillTiles
from vllm.v1.attention.backend import AttentionMetadata

DenseKernel = Literal["cpu", "triton", "fa3"]


@dataclass
class DecodeRecord:
    """What one layer's last selective decode had and gave, for an audit; the same memory in every step."""

    query: torch.Tensor
    """[max_num_reqs, num_q_heads, head_dim], of the cold heads."""
    lse: torch.Tensor
    """[num_q_heads, max_num_reqs] float32, natural log, of what was read."""
    left: torch.Tensor
    """As `lse`: an upper bound for what was not read."""
    scale: float = 0.0
    """On the logits."""


@dataclass(frozen=True)
class LayerSelection:
    """How one layer's decode chooses pages in host memory."""

    bounds: PageBounds
    rule: Rule
    buffers: SelectionBuffers
    """Of all layers; lists the step's pages in host memory already."""
    record: DecodeRecord
    num_sms: int


@dataclass(frozen=True)
class Decode:
    """One query token per request over all its keys, or a few, each over those up to its own."""

    splits: SplitPlan
    workspace: DecodeWorkspace | None
    """Where the splits are combined, kept from step to step so that captured graphs stay valid; None on the CPU."""
    selections: Mapping[int, LayerSelection] | None = None
    """By the index of the layer; None where all keys are read."""
    query_len: int = 1
    """The most tokens that a request has. Where it is 1, requests have the rows of their numbers, padding included."""


@dataclass(frozen=True)
class Dense:
    """Chunks over all their keys."""

    kernel: DenseKernel
    tiles: PrefillTiles | None
    """For "triton"; the other kernels cut their own."""


@dataclass(frozen=True)
class SampledRows:
    """Query rows on which a sparse launch is held against all keys."""

    rows: torch.Tensor
    """[num_reqs * rows_per_request] int32, rows of the pass; those of a request are adjacent."""
    batch: PagedBatch
    """Every row as a request of one query, at its own position."""
    splits: SplitPlan
    has_choice: torch.Tensor | None = None
    """[num_reqs * rows_per_request] bool: whether the row's list could leave a block out and the row did not choose it;
    None counts all rows."""


@dataclass(frozen=True)
class Sparse:
    """Chunks over the blocks of lists."""

    prefill: FlexPrefill | BlockSparsePrefill
    tiles: PrefillTiles
    lists: BlockLists | None
    """Lists that all heads and layers share; None where the layer's selector makes them."""
    samples: SampledRows | None
    """Where the kept mass is measured beside the selection; None where nothing is."""
    spans: Spans | None = None
    """Where selection by tile rows looks; None for the other selections."""


@dataclass(frozen=True)
class Part:
    """Which of the partial passes over the same rows a pass is."""

    index: int
    """In [0, count). The passes of a set follow each other; the last one combines them."""
    count: int
    exchange: Exchange | None = None
    """With the hosts that have further keys of the same rows; the pass is the only one of its set then."""
    is_last: bool = True
    """Whether the rows have no heads left after this pass: the hosts exchange the results of all heads at once. Passes
    of the same rows and other heads follow each other."""


@dataclass(frozen=True)
class StagedPages:
    """The pages of cold heads that a pass reads, some of them in host memory, in the order in which they are staged.

    All pages of some requests, or a span of those of one.
    """

    entries: torch.Tensor
    """[num_pages] int32 on the device: a slot, or -1 - block for a page in host memory."""
    are_of_one: bool = False
    """Whether the pass is of one request, which has these as its pages from the first on."""
    group_size: int | None = None
    """KV heads that are staged together; None for the engine's usual number."""


Keys = Literal["cache", "slots", "both"] | StagedPages
"""Where a pass finds its keys: vLLM's own cache (hot heads), slots alone, slots and host memory, or pages that are
brought to the device for the pass (cold heads)."""


@dataclass(frozen=True)
class Pass:
    """One attention call on some rows and some KV heads of a layer."""

    rows: slice
    """Of the step's query and output."""
    kv_heads: slice
    """Of the layer's KV heads on this rank; the query heads that share them follow."""
    batch: PagedBatch
    work: Decode | Dense | Sparse
    turns: bool = False
    """Whether the layer's turn reaches any query of the pass; the others are computed as if there were none."""
    is_causal: bool = True
    keys: Keys = "cache"
    part: Part | None = None
    """None where the pass sees all keys of its rows, so that its result is the output."""


@dataclass(frozen=True)
class HeadOrder:
    """Hot heads first: where each head of a layer on this rank comes from."""

    kv_heads: torch.Tensor
    """[num_kv_heads] int64."""
    q_heads: torch.Tensor
    """[num_q_heads] int64."""


@dataclass(frozen=True)
class LayerContext:
    """What a layer brings to its passes; made once, from the layer's name and the loaded model."""

    index: int
    """The layer's place in the model, pipeline stages before this one included."""
    next_index: int | None
    """The layer of this KV cache group that runs next on this rank; None for the last one."""
    turn: Turn | None
    selector: Selector | None
    """Chooses the blocks of sparse passes; None for dense prefill and where all layers share their lists."""
    to_true_positions: Turns | None = None
    """The turns of queries and keys by whole distances; None without the option star."""
    head_order: HeadOrder | None = None
    """None where the first heads of the layer are the hot ones."""


class ColdStep(Protocol):
    """The cold heads of one step's layers."""

    def kv_heads(self, layer_name: str) -> slice:
        """A layer's cold heads among its KV heads on this rank, hot heads first."""
        ...

    def write(self, layer_name: str, key: torch.Tensor, value: torch.Tensor, **scales: float) -> None:
        """Write the step's keys and values of a layer's cold heads into their slots.

        key, value: [at least num_tokens, num_cold_heads, head_dim]. scales: `key_scale` and `value_scale` of a float8
        cache, see `launch.write_kv`.
        """
        ...

    def view(self, layer_name: str, each: Pass) -> KVView:
        """The keys and values of a pass, which does not read vLLM's cache; valid until the next call. A float8 cache's
        scales are left out.
        """
        ...


@dataclass(frozen=True)
class StepMetadata(AttentionMetadata):
    """One step of one KV cache group."""

    passes: tuple[Pass, ...]
    layers: Mapping[str, LayerContext]
    """By the name of the layer."""
    moved: tuple[tuple[slice, int | None], ...] = ()
    """Rows of the step that stand elsewhere than where vLLM rotated them, with the distance to add, in tokens; None
    where each row has its own in the layers' turns."""
    plan: StepPlan | None = None
    """What the scheduler decided for this step; None under a scheduler that sends no plans."""
    cold: ColdStep | None = None
    """None where no KV head is cold."""
    key_exchange: KeyExchange | None = None
    """What each layer brings from other hosts before its passes read the cache; None where they need no more."""
