"""The option tree under `additional_config["farspan"]`: decoded once, validated, then frozen."""

from typing import Any, Literal

import msgspec
from farspan.engine_ext.errors import ConfigError

Kernel = Literal["auto", "triton", "fa3"]
Pattern = Literal["sink_local", "strided", "butterfly", "dilated", "file"]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every option struct: frozen, unknown fields refused."""


class DensePrefill(Options, tag_field="method", tag="dense"):
    """Exact attention for every prompt."""


class FlexPrefill(Options, tag_field="method", tag="flex"):
    """Dynamic sparse prefill: a pattern and a budget per head and per prompt. Source: FlexPrefill, arXiv 2502.20766."""

    gamma: float = 0.95
    """Attention mass that the selected blocks must keep, in (0, 1]."""
    tau: float = 0.1
    """Query-aware selection where sqrt(Jensen-Shannon divergence), natural log, is below this; in [0, 1]."""
    min_budget: int = 1024
    """Fewest KV tokens that every query tile reads (where its causal prefix has them)."""
    max_budget: int | None = None
    """Most KV tokens that a query tile reads; None for no limit."""
    share_kv_group: bool = False
    """One list for the query heads that share a KV head (their union), instead of one a query head."""
    min_seq_len: int | None = None
    """Requests shorter than this prefill densely; None for the measured crossover."""
    coverage_rows: int = 0
    """Query rows a chunk on which the kept mass is measured; 0 switches the measurement and its closed loop off."""


class BlockSparsePrefill(Options, tag_field="method", tag="block_sparse"):
    """Static block masks. Source: Block-Sparse FlashAttention, arXiv 2205.14135, section 3.3."""

    pattern: Pattern = "sink_local"
    block_size: int = 128
    """Tokens of a mask block: 64 or 128."""
    sink_blocks: int = 1
    """sink_local: first blocks that every query reads."""
    local_blocks: int = 8
    """sink_local, strided, dilated: blocks up to and including the diagonal one that every query reads."""
    stride: int = 8
    """strided, dilated: distance in blocks between the columns read beyond the local ones."""
    mask_file: str | None = None
    """file: an .npy or .safetensors file with a boolean array [layers or 1, heads or 1, blocks, blocks]."""


class StringOptions(Options):
    """Shifted rotary positions. Source: STRING, arXiv 2410.18745."""

    shift: float | int = 0.33
    """S: tokens if an integer, a fraction of the model's trained length if a float below 1."""
    window: int = 128
    """W: a distance d >= S is treated as d - S + W."""
    logit_scale: float = 1.0
    """Factor on the attention logits."""


Prefill = DensePrefill | FlexPrefill | BlockSparsePrefill


class FarspanConfig(Options):
    """Everything that a user can set."""

    kernel: Kernel = "auto"
    """Dense prefill: FlashAttention 3 where vLLM has it and it measures faster, else ours (auto), or one by name."""
    prefill: Prefill = msgspec.field(default_factory=DensePrefill)
    string: StringOptions | None = None


def parse_config(raw: Any) -> FarspanConfig:
    """Decode and validate the options.

    raw: the value of `additional_config["farspan"]`, a mapping or None.
    Raises ConfigError naming the option, the value given, what is allowed and what to do.
    """
    try:
        config = msgspec.convert(raw or {}, FarspanConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f'additional_config["farspan"]: {error}') from error
    return config
