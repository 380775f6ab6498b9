"""The option tree under `additional_config["farspan"]`: decoded once per process, validated, then frozen."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.head_profile import check_profile, counts_by_score
from farspan.engine_ext.presets import Preset, expand_preset
from farspan.engine_ext.ranges import OneOf, Real, Whole, ranges_of
from farspan.engine_ext.refusing import (
    ROOT,
    check_known,
    check_list,
    check_mapping,
    check_numbers,
    describe_type_error,
    one_of,
    refuse,
    suggestion,
)

MAX_TOKENS = 2**24
"""Upper bound of every option in tokens: above any context that is served, and safe in int32 arithmetic."""
MAX_BLOCKS = MAX_TOKENS // 128
MAX_COVERAGE_ROWS = 256
"""Each row costs a decode step over its whole prefix."""
MIN_TILE_ROWS_BUDGET = 384
"""Tokens of the blocks that `tile_rows` always lists, the first and the tile's own, and of one more."""

CrossoverLen = Annotated[int, Whole(0, MAX_TOKENS, unit="tokens", hint="null for the measured crossover")]
FractionOfTrainedLen = Annotated[
    float, Real(0, 1, least_included=False, most_included=False, hint="0.33", noun="a fraction of the trained length")
]

MAX_HEADS = 1024
"""Upper bound of every option in KV heads of a layer."""

Kernel = Literal["auto", "triton", "fa3"]
Selection = Literal["tile_rows", "flexprefill"]
Pattern = Literal["sink_local", "strided", "butterfly", "dilated", "file"]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every option struct: frozen, unknown fields refused, numbers in the ranges that their types name."""

    def check(self, path: str) -> None:
        """Raise ConfigError where a value is out of range; path: where the struct is in the option tree."""
        check_numbers(path, type(self), msgspec.structs.asdict(self))


class DensePrefill(Options, frozen=True, tag_field="method", tag="dense"):
    """Exact attention for every prompt."""


class FlexPrefill(Options, frozen=True, tag_field="method", tag="flex"):
    """Dynamic sparse prefill: a choice of blocks per head and per prompt."""

    selection: Selection = "tile_rows"
    """tile_rows: by the exact attention of sampled rows of every query tile; flexprefill: by patterns of a chunk's last
    queries, as in FlexPrefill, arXiv 2502.20766. Cost: tile_rows reads more blocks at the same gamma, and keeps
    more."""
    gamma: Annotated[float, Real(0, 1, least_included=False, hint="0.95, or 0.9 for more speed")] = 0.95
    """Attention mass that the selected blocks must keep. Cost: a higher one reads more blocks, which takes longer; a
    lower one changes answers more."""
    tau: Annotated[float, Real(0, 1, hint="0.1, or 0 to never choose by query")] = 0.1
    """flexprefill: query-aware selection where sqrt(Jensen-Shannon divergence), natural log, is below this."""
    min_budget: Annotated[int, Whole(257, MAX_TOKENS, unit="tokens", hint="1024", besides=0)] = 1024
    """Fewest KV tokens that every query tile reads (where its causal prefix has them), rounded up to blocks of 128. The
    first block and the tile's own are always read, so 1 to 256 would have no effect, and are refused. Cost: time, most
    on short prefixes, of which it is a large part."""
    max_budget: Annotated[int, Whole(256, MAX_TOKENS, unit="tokens", hint="null for no limit")] | None = None
    """Most KV tokens that a query tile reads, rounded down to blocks of 128; None for no limit. It overrides gamma.
    At least 384 with selection "tile_rows". Cost: heads that need more lose mass."""
    share_kv_group: bool = False
    """One list for the query heads that share a KV head (their union), instead of one per query head. Cost: each
    head reads what the others need."""
    min_seq_len: CrossoverLen | None = None
    """Prompts of fewer tokens than this prefill densely; None leaves it to what was measured, chunk by chunk: dense
    where a chunk's selection and sparse attention would take longer than dense attention. Cost: with a low number short
    prompts take longer than with dense attention."""
    min_chunk_len: CrossoverLen | None = None
    """Chunks with fewer query tokens than this prefill densely; None as for `min_seq_len`. With a number for either
    option, what was measured decides nothing. Cost: with a low number short chunks take longer than with dense
    attention."""
    coverage_rows: Annotated[int, Whole(0, MAX_COVERAGE_ROWS, unit="rows", hint="4, or 0 to measure nothing")] = 0
    """Query rows per chunk, other than those that chose the blocks, on which the kept mass is measured, for the
    statistics of engines whose worker extension reads them; other engines measure nothing. Cost: each row is a decode
    step over its whole prefix."""

    def check(self, path: str) -> None:
        """See `Options.check`; also where the two budgets contradict each other."""
        super().check(path)
        if self.max_budget is not None and self.max_budget < self.min_budget:
            refuse(
                f"{path}.max_budget",
                self.max_budget,
                f"at least min_budget, which is {self.min_budget}",
                "Raise max_budget or lower min_budget",
            )
        if self.selection == "tile_rows" and self.max_budget is not None and self.max_budget < MIN_TILE_ROWS_BUDGET:
            refuse(
                f"{path}.max_budget",
                self.max_budget,
                f"at least {MIN_TILE_ROWS_BUDGET} with selection 'tile_rows', which always reads two blocks",
                f"Raise it to {MIN_TILE_ROWS_BUDGET}, or take selection 'flexprefill'",
            )


class BlockSparsePrefill(Options, frozen=True, tag_field="method", tag="block_sparse"):
    """Static block masks. Source: Block-Sparse FlashAttention, arXiv 2205.14135, section 3.3."""

    pattern: Pattern = "sink_local"
    """Which blocks a query block reads: the first ones and the last (sink_local), the last and every stride-th before
    (strided), those whose number differs from its own in one bit (butterfly), local_blocks of them at a distance of
    stride (dilated), or those of a mask (file). Cost: what stands in blocks that no query reads is lost."""
    block_size: Annotated[int, OneOf((64, 128), unit="tokens", hint="128")] = 128
    """Tokens of a mask block."""
    sink_blocks: Annotated[int, Whole(0, MAX_BLOCKS, unit="blocks", hint="1")] = 1
    """sink_local: first blocks that every query reads. Cost: time in proportion to the blocks read."""
    local_blocks: Annotated[int, Whole(1, MAX_BLOCKS, unit="blocks", hint="8")] = 8
    """sink_local, strided, dilated: blocks up to and including the diagonal one that every query reads. Cost: time
    in proportion to the blocks read."""
    stride: Annotated[int, Whole(1, MAX_BLOCKS, unit="blocks", hint="8")] = 8
    """strided, dilated: distance in blocks between the columns read beyond the local ones. Cost: a smaller one reads
    more blocks."""
    mask_file: str | None = None
    """file: an .npy or .safetensors file with a boolean array [layers or 1, heads or 1, blocks, blocks]; heads are
    query or KV heads. Cost: a list of blocks per layer in GPU memory."""

    def check(self, path: str) -> None:
        """See `Options.check`; also where pattern and mask_file contradict each other."""
        super().check(path)
        if self.pattern == "file":
            if self.mask_file is None:
                refuse(f"{path}.mask_file", None, "a path when pattern is 'file'", "Name an .npy or .safetensors file")
            if not self.mask_file.endswith((".npy", ".safetensors")):
                refuse(f"{path}.mask_file", self.mask_file, "a path ending in .npy or .safetensors", "Convert the mask")


class StringOptions(Options, frozen=True):
    """Shifted rotary positions. Source: STRING, arXiv 2410.18745."""

    shift: FractionOfTrainedLen | Annotated[int, Whole(1, MAX_TOKENS, unit="tokens", hint="0.33")] = 0.33
    """S: tokens if an integer, a fraction of the model's trained length if a float below 1. Cost: what is
    longer is prefilled by our kernel, also on Hopper."""
    window: Annotated[int, Whole(1, MAX_TOKENS, unit="tokens", hint="128")] = 128
    """W: a distance d >= S is treated as d - S + W."""
    logit_scale: Annotated[float, Real(0.1, 10, hint="1.0")] = 1.0
    """Factor on all attention logits of all requests, those shorter than the shift included."""

    def check(self, path: str) -> None:
        """See `Options.check`; also where a window is longer than its shift."""
        super().check(path)
        if isinstance(self.shift, int) and self.window > self.shift:
            refuse(
                f"{path}.window",
                self.window,
                f"at most shift, which is {self.shift}: a longer window would move keys further away, not closer",
                "Lower window or raise shift",
            )


class ExactColdDecode(Options, frozen=True, tag_field="method", tag="exact"):
    """Decode reads every page of cold heads."""


class SelectColdDecode(Options, frozen=True, tag_field="method", tag="select"):
    """Decode leaves out pages in host memory that weigh little by the bounds of their keys."""

    coverage: Annotated[float, Real(0, 1, least_included=False, hint="0.95, or 1 to read every page")] = 0.95
    """Attention mass of every query head of a cold KV head that the pages it reads must keep. Cost: with more of it
    more pages are read."""
    certified: bool = False
    """Whether that is certain, by the bounds, and not only by their estimates. Cost: it reads two to four times
    as much."""


ColdDecode = ExactColdDecode | SelectColdDecode

COLD_DECODE_METHODS: dict[str, type[Options]] = {"exact": ExactColdDecode, "select": SelectColdDecode}


class OffloadOptions(Options, frozen=True):
    """Cold KV heads in host memory: requests larger than GPU memory. Source: HeadInfer, arXiv 2502.12574."""

    host_memory: Literal["auto"] | Annotated[float, Real(0, 65536, least_included=False, hint='"auto"')] = "auto"
    """GiB of host memory per machine for cold KV heads, shared by its ranks and Star hosts; "auto" takes 60 % of what
    is free at start-up, and no more than `max_num_seqs` requests of `max_model_len` can use. Cost: the memory is taken,
    and pinned, at start-up, which takes time in proportion."""
    hot_heads: (
        Literal["auto"]
        | Annotated[int, Whole(0, MAX_HEADS, unit="KV heads", hint='"auto"')]
        | tuple[Annotated[int, Whole(0, MAX_HEADS, unit="KV heads", hint='"auto"')], ...]
    ) = "auto"
    """KV heads of each layer, over all ranks, that stay in GPU memory: one number, or one for each layer; "auto" is 0.
    The GPU memory that they leave holds pages of the cold ones. Cost: with more of them fewer blocks fit."""
    head_profile: str | None = None
    """A file that `farspan profile` wrote: the heads that look farthest back are the hot ones. `hot_heads` is then how
    many of each layer, on average if it is one number; None: the first heads of each layer. Cost: none."""
    group_size: Literal["auto"] | Annotated[int, Whole(1, MAX_HEADS, unit="KV heads", hint='"auto"')] = "auto"
    """KV heads of a rank whose pages are brought to GPU memory together for prefill; "auto" takes as many as leave room
    for the longest request, or for more than an eighth of the memory for KV, and more of shorter requests. Cost: GPU
    memory for two such groups."""
    cold_decode: ColdDecode = msgspec.field(default_factory=ExactColdDecode)
    """How decode reads pages in host memory: "exact" reads all of them, "select" those that weigh most. Cost: with
    "select" answers are approximate, and bounds of the keys take an eighth of the cold KV in GPU memory."""

    def check(self, path: str) -> None:
        """See `Options.check`; also each number of a list."""
        super().check(path)
        self.cold_decode.check(f"{path}.cold_decode")
        has_hot = any(self.hot_heads) if isinstance(self.hot_heads, tuple) else self.hot_heads not in ("auto", 0)
        if self.head_profile is not None and not has_hot:
            refuse(
                f"{path}.head_profile",
                self.head_profile,
                "only with hot_heads of at least 1, as no head is hot without",
                "Set hot_heads, such as to a quarter of the KV heads of a layer, or leave out head_profile",
            )
        if isinstance(self.hot_heads, tuple):
            check_list(f"{path}.hot_heads", self.hot_heads, ranges_of(type(self))["hot_heads"][0])

    def hot_heads_per_layer(self, num_layers: int, num_kv_heads: int, num_ranks: int) -> tuple[int, ...]:
        """Hot KV heads of every layer on each rank of a tensor-parallel group.

        num_kv_heads: of a layer of the whole model. Raises ConfigError where the option fits neither layers nor ranks.
        """
        path, hot = f"{ROOT}.offload.hot_heads", self.hot_heads
        if isinstance(hot, tuple) and len(hot) != num_layers:
            refuse(
                path,
                list(hot),
                f"one number for each of the model's {num_layers} layers, not {len(hot)}",
                "Give one number for all layers, or one for each",
            )
        # A rank has at least one KV head: fewer heads than ranks are repeated on them.
        per_rank = max(num_kv_heads // num_ranks, 1)
        counts = hot if isinstance(hot, tuple) else (0 if hot == "auto" else hot,) * num_layers
        if self.head_profile is not None:
            profile = check_profile(self.head_profile, num_layers, num_kv_heads)
            if isinstance(hot, int) and hot <= num_kv_heads:
                counts = counts_by_score(profile, hot, num_ranks)
        for count in counts:
            if count > num_kv_heads or count * per_rank % num_kv_heads:
                refuse(
                    path,
                    count,
                    f"multiples of {num_kv_heads // per_rank} up to {num_kv_heads}, the KV heads of a layer, so that "
                    f"each of {num_ranks} ranks has as many",
                    "Use 'auto'",
                )
        return tuple(count * per_rank // num_kv_heads for count in counts)


class StarOptions(Options, frozen=True):
    """A host of Star Attention. Source: Star Attention, arXiv 2411.17116."""

    timeout_s: Annotated[float, Real(0.1, 3600, hint="60", noun="a number of seconds")] = 60.0
    """How long a host waits for the others in phase 2, and how long one may make no progress in either phase. Cost: a
    host that is lost is noticed only then."""
    graphs: bool = False
    """Decode in CUDA graphs that hold the exchange. Every request of the engine must then be one of all hosts.
    Cost: no request of one host alone."""


Prefill = DensePrefill | FlexPrefill | BlockSparsePrefill

PREFILL_METHODS: dict[str, type[Options]] = {
    "dense": DensePrefill,
    "flex": FlexPrefill,
    "block_sparse": BlockSparsePrefill,
}
PATTERN_OPTIONS: dict[str, frozenset[str]] = {
    "sink_local": frozenset({"sink_blocks", "local_blocks"}),
    "strided": frozenset({"local_blocks", "stride"}),
    "dilated": frozenset({"local_blocks", "stride"}),
    "butterfly": frozenset(),
    "file": frozenset({"mask_file"}),
}
"""The options of BlockSparsePrefill that each pattern reads, besides `pattern` and `block_size`."""


class FarspanConfig(Options, frozen=True):
    """Everything that a user can set."""

    preset: Preset | None = None
    """A name for a whole set of options: exact (dense prefill), balanced (flex with gamma 0.95), fast (flex with gamma
    0.9), max-context (dense prefill, cold KV heads in host memory). Options beside it refine it; those that contradict
    it are refused."""
    kernel: Kernel = "auto"
    """Dense prefill: FlashAttention 3 where vLLM has it and it can serve the model, else ours (auto), or one by name;
    triton also stands for our kernel in Gluon on Hopper. Cost: triton takes 2 to 6 % longer on Hopper for whole prompts
    of 8K to 128K tokens, with heads of 64 8 to 10 %, with other sizes more."""
    prefill: Prefill = msgspec.field(default_factory=DensePrefill)
    """How prompts are computed: a method with its options."""
    string: StringOptions | None = None
    """Shifted positions; null for the model's own."""
    offload: OffloadOptions | None = None
    """Cold KV heads in host memory; null keeps all KV in GPU memory."""
    star: StarOptions | None = None
    """Makes an engine a host of Star Attention, which StarLLM does by itself."""

    @property
    def changes_kv(self) -> bool:
        """Whether the KV of a prompt differs from exact KV, so that its blocks must not be shared with exact ones."""
        return self.string is not None or not isinstance(self.prefill, DensePrefill)


_decoded: dict[str, FarspanConfig] = {}


def decode_once(raw: Any) -> FarspanConfig:
    """`parse_config`, done once per process and option tree.

    The key is what the tree says, not which object it is: trees arrive pickled, copied, and changed in place.
    """
    # Unlike the tree itself, its text tells 1 from 1.0 and True.
    key = repr(raw)
    if key not in _decoded:
        _decoded[key] = parse_config(raw)
    return _decoded[key]


def parse_config(raw: Any) -> FarspanConfig:
    """Decode and validate the options.

    raw: the value of `additional_config["farspan"]`, a mapping or None.
    Raises ConfigError naming the option, the value given, what is allowed and what to do.
    """
    if raw is None:
        return FarspanConfig()
    check_mapping(ROOT, raw)
    preset, raw = raw.get("preset"), expand_preset(raw)
    check_raw(raw)
    try:
        config = msgspec.structs.replace(msgspec.convert(raw, FarspanConfig), preset=preset)
    except msgspec.ValidationError as error:
        raise ConfigError(describe_type_error(raw, str(error))) from error
    config.prefill.check(f"{ROOT}.prefill")
    if config.offload is not None:
        config.offload.check(f"{ROOT}.offload")
        if preset == "exact" and isinstance(config.offload.cold_decode, SelectColdDecode):
            refuse(
                f"{ROOT}.offload.cold_decode",
                raw["offload"]["cold_decode"],
                'method "exact" with preset "exact"',
                "Leave out cold_decode or preset",
            )
        if config.offload.head_profile is not None and getattr(config.prefill, "mask_file", None) is not None:
            refuse(
                f"{ROOT}.offload.head_profile",
                config.offload.head_profile,
                "without prefill.mask_file: its masks are in the order of the model's heads",
                "Leave out head_profile or mask_file",
            )
    if config.string is not None:
        config.string.check(f"{ROOT}.string")
        if config.kernel == "fa3":
            refuse(
                f"{ROOT}.kernel",
                config.kernel,
                "auto or triton together with string: FlashAttention 3 cannot apply shifted positions",
                "Leave kernel out",
            )
        if config.offload is not None and isinstance(config.offload.cold_decode, SelectColdDecode):
            refuse(
                f"{ROOT}.offload.cold_decode",
                raw["offload"]["cold_decode"],
                "method 'exact' together with string: by the bounds of keys a query has one position, with string two",
                "Leave out cold_decode or string",
            )
    if config.star is not None:
        config.star.check(f"{ROOT}.star")
        if config.string is not None:
            refuse(
                f"{ROOT}.star",
                raw["star"],
                "without string: both move positions, and a key would need two rotations at once",
                "Leave out string, or serve the model on one host without star",
            )
        if config.offload is not None:
            check_cold_star(config.star, config.offload, raw)
    return config


def check_cold_star(star: StarOptions, offload: OffloadOptions, raw: Any) -> None:
    """Refuse what a host of Star Attention cannot do with cold KV heads."""
    if star.graphs:
        refuse(
            f"{ROOT}.star.graphs",
            True,
            "False together with offload: a graph would hold the pages of one request in slots and host memory",
            "Leave out graphs or offload",
        )
    if isinstance(offload.cold_decode, SelectColdDecode):
        refuse(
            f"{ROOT}.offload.cold_decode",
            raw["offload"]["cold_decode"],
            "method 'exact' together with star: hosts would choose by the mass of their own keys, not of all",
            "Leave out cold_decode or star",
        )


def check_raw(raw: Any) -> None:
    """Refuse names that do not exist, or that have no effect, and numbers out of range, in the raw tree."""
    check_known(ROOT, raw, FarspanConfig.__struct_fields__)
    kernel = raw.get("kernel", "auto")
    if kernel not in get_args(Kernel):
        refuse(f"{ROOT}.kernel", kernel, one_of(get_args(Kernel)), suggestion(kernel, get_args(Kernel)))
    prefill = raw.get("prefill")
    if prefill is not None:
        path = f"{ROOT}.prefill"
        check_method(path, prefill, PREFILL_METHODS)
        if prefill["method"] == "block_sparse":
            check_pattern_options(path, prefill)
        if prefill["method"] == "flex":
            check_selection_options(path, prefill)
    if raw.get("string") is not None:
        path = f"{ROOT}.string"
        check_mapping(path, raw["string"])
        check_known(path, raw["string"], StringOptions.__struct_fields__)
        check_numbers(path, StringOptions, raw["string"])
    if raw.get("star") is not None:
        path = f"{ROOT}.star"
        check_mapping(path, raw["star"])
        check_known(path, raw["star"], StarOptions.__struct_fields__)
        check_numbers(path, StarOptions, raw["star"])
    if raw.get("offload") is not None:
        check_raw_offload(f"{ROOT}.offload", raw["offload"])


def check_raw_offload(path: str, offload: Any) -> None:
    """Refuse what `offload` cannot be, each number of a list included."""
    check_mapping(path, offload)
    check_known(path, offload, OffloadOptions.__struct_fields__)
    check_numbers(path, OffloadOptions, offload)
    for name, value in offload.items():
        if name == "head_profile":
            if value is not None and not isinstance(value, str):
                refuse(f"{path}.{name}", value, "a path, or null", "Name a file that `farspan profile` wrote")
            continue
        if name == "cold_decode":
            check_method(f"{path}.{name}", value, COLD_DECODE_METHODS)
            continue
        allowed = ranges_of(OffloadOptions)[name][0]
        if isinstance(value, list | tuple) and name == "hot_heads":
            check_list(f"{path}.{name}", value, allowed)
        elif value != "auto" and not isinstance(value, int | float):
            also = f'{allowed.allowed}, or "auto"' + (", or a list of numbers" if name == "hot_heads" else "")
            refuse(f"{path}.{name}", value, also, 'Use "auto"')


def check_method(path: str, raw: Any, methods: Mapping[str, type[Options]]) -> None:
    """Refuse options of what `method` names that cannot be; methods: the structs by that name."""
    check_mapping(path, raw)
    method = raw.get("method")
    if not isinstance(method, str) or method not in methods:
        named = suggestion(method, methods)
        refuse(f"{path}.method", method, one_of(methods), named if "method" in raw else "Name one beside the others")
    check_known(path, raw, ("method", *methods[method].__struct_fields__))
    check_numbers(path, methods[method], raw)


def check_pattern_options(path: str, prefill: Mapping[str, Any]) -> None:
    """Refuse options of block_sparse that the chosen pattern does not read."""
    pattern = prefill.get("pattern", "sink_local")
    if not isinstance(pattern, str) or pattern not in PATTERN_OPTIONS:
        refuse(f"{path}.pattern", pattern, one_of(PATTERN_OPTIONS), suggestion(pattern, PATTERN_OPTIONS))
    for name in prefill:
        if name not in PATTERN_OPTIONS[pattern] | {"method", "pattern", "block_size"}:
            readers = [other for other, names in PATTERN_OPTIONS.items() if name in names]
            refuse(
                f"{path}.{name}",
                prefill[name],
                f"only with pattern {' or '.join(readers)}; pattern is {pattern!r}",
                f"Remove {name} or change the pattern",
            )


def check_selection_options(path: str, prefill: Mapping[str, Any]) -> None:
    """Refuse unknown ways to select, and options of flex that the chosen one does not read."""
    selection = prefill.get("selection", "tile_rows")
    if selection not in get_args(Selection):
        refuse(f"{path}.selection", selection, one_of(get_args(Selection)), suggestion(selection, get_args(Selection)))
    if selection == "tile_rows" and "tau" in prefill:
        refuse(f"{path}.tau", prefill["tau"], "only with selection 'flexprefill'", "Remove tau or change the selection")
