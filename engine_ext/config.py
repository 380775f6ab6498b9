"""The option tree under `additional_config["farspan"]`: decoded once, validated, then frozen."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn, get_args

import msgspec
from farspan.engine_ext.errors import ConfigError

ROOT = 'additional_config["farspan"]'

Kernel = Literal["auto", "triton", "fa3"]
Pattern = Literal["sink_local", "strided", "butterfly", "dilated", "file"]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every option struct: frozen, unknown fields refused."""


class DensePrefill(Options, frozen=True, tag_field="method", tag="dense"):
    """Exact attention for every prompt."""


class FlexPrefill(Options, frozen=True, tag_field="method", tag="flex"):
    """Dynamic sparse prefill: a pattern and a budget per head and per prompt. Source: FlexPrefill, arXiv 2502.20766."""

    gamma: float = 0.95
    """Attention mass that the selected blocks must keep, in (0, 1]."""
    tau: float = 0.1
    """Query-aware selection where sqrt(Jensen-Shannon divergence), natural log, is below this; in [0, 1]."""
    min_budget: int = 1024
    """Fewest KV tokens that every query tile reads (where its causal prefix has them)."""
    max_budget: int | None = None
    """Most KV tokens that a query tile reads; None for no limit. It overrides gamma: no head is
    computed again."""
    share_kv_group: bool = False
    """One list for the query heads that share a KV head (their union), instead of one a query head."""
    min_seq_len: int | None = None
    """Chunks whose prefix, their own tokens included, is shorter than this prefill densely; None for the measured
    crossover. In chunks of 2,048 the first 8,192 tokens of any prompt are dense by default."""
    min_chunk_len: int | None = None
    """Chunks with fewer query tokens than this prefill densely; None for the measured crossover."""
    coverage_rows: int = 4
    """Query rows per chunk on which the kept mass is measured. Heads that lost clearly more than 1 - gamma are computed
    again over all keys. 0 switches both off."""

    def check(self, path: str) -> None:
        """Raise ConfigError where a value is out of range; path: where the struct lies in the tree."""
        check_fraction(f"{path}.gamma", self.gamma, zero_allowed=False, hint="0.95, or 0.9 for more speed")
        check_fraction(f"{path}.tau", self.tau, zero_allowed=True, hint="0.1, or 0 to never choose by query")
        check_at_least(f"{path}.min_budget", self.min_budget, 0, unit="tokens", hint="1024")
        if self.max_budget is not None:
            check_at_least(f"{path}.max_budget", self.max_budget, 128, unit="tokens", hint="null for no limit")
            if self.max_budget < self.min_budget:
                refuse(
                    f"{path}.max_budget",
                    self.max_budget,
                    f"at least min_budget, which is {self.min_budget}",
                    "Raise max_budget or lower min_budget",
                )
        for name, least in (("min_seq_len", self.min_seq_len), ("min_chunk_len", self.min_chunk_len)):
            if least is not None:
                check_at_least(f"{path}.{name}", least, 0, unit="tokens", hint="null for the measured crossover")
        check_at_least(f"{path}.coverage_rows", self.coverage_rows, 0, unit="rows", hint="4, or 0 to measure nothing")


class BlockSparsePrefill(Options, frozen=True, tag_field="method", tag="block_sparse"):
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

    def check(self, path: str) -> None:
        """Raise ConfigError where a value is out of range; path: where the struct lies in the tree."""
        if self.block_size not in (64, 128):
            refuse(f"{path}.block_size", self.block_size, "64 or 128 tokens", "Use 128")
        check_at_least(f"{path}.sink_blocks", self.sink_blocks, 0, unit="blocks", hint="1")
        check_at_least(f"{path}.local_blocks", self.local_blocks, 1, unit="blocks", hint="8")
        check_at_least(f"{path}.stride", self.stride, 1, unit="blocks", hint="8")
        if self.pattern == "file":
            if self.mask_file is None:
                refuse(f"{path}.mask_file", None, "a path when pattern is 'file'", "Name an .npy or .safetensors file")
            if not self.mask_file.endswith((".npy", ".safetensors")):
                refuse(f"{path}.mask_file", self.mask_file, "a path ending in .npy or .safetensors", "Convert the mask")


class StringOptions(Options, frozen=True):
    """Shifted rotary positions. Source: STRING, arXiv 2410.18745."""

    shift: float | int = 0.33
    """S: tokens if an integer, a fraction of the model's trained length if a float below 1."""
    window: int = 128
    """W: a distance d >= S is treated as d - S + W."""
    logit_scale: float = 1.0
    """Factor on the attention logits."""

    def check(self, path: str) -> None:
        """Raise ConfigError where a value is out of range; path: where the struct lies in the tree."""
        fraction = isinstance(self.shift, float)
        if not (0 < self.shift < 1 if fraction else self.shift >= 1):
            refuse(
                f"{path}.shift",
                self.shift,
                "a fraction of the trained length in (0, 1), or a whole number of tokens >= 1",
                "Use 0.33",
            )
        check_at_least(f"{path}.window", self.window, 1, unit="tokens", hint="128")
        if not fraction and self.window > self.shift:
            refuse(
                f"{path}.window",
                self.window,
                f"at most shift, which is {self.shift}: a longer window would move keys further away, not closer",
                "Lower window or raise shift",
            )
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            refuse(f"{path}.logit_scale", self.logit_scale, "a finite number above 0", "Use 1.0")


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

    kernel: Kernel = "auto"
    """Dense prefill: FlashAttention 3 where vLLM has it and it measures faster, else ours (auto), or one by name."""
    prefill: Prefill = msgspec.field(default_factory=DensePrefill)
    string: StringOptions | None = None

    @property
    def changes_kv(self) -> bool:
        """Whether the KV of a prompt differs from exact KV, so that its blocks must not be shared with exact ones."""
        return self.string is not None or not isinstance(self.prefill, DensePrefill)


def parse_config(raw: Any) -> FarspanConfig:
    """Decode and validate the options.

    raw: the value of `additional_config["farspan"]`, a mapping or None.
    Raises ConfigError naming the option, the value given, what is allowed and what to do.
    """
    if raw is None:
        return FarspanConfig()
    check_names(raw)
    try:
        config = msgspec.convert(raw, FarspanConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(describe_type_error(raw, str(error))) from error
    if not isinstance(config.prefill, DensePrefill):
        config.prefill.check(f"{ROOT}.prefill")
    if config.string is not None:
        config.string.check(f"{ROOT}.string")
        if config.kernel == "fa3":
            refuse(
                f"{ROOT}.kernel",
                config.kernel,
                "auto or triton together with string: FlashAttention 3 cannot apply shifted positions",
                "Leave kernel out",
            )
    return config


def check_names(raw: Any) -> None:
    """Refuse names that do not exist, or that have no effect, in the raw tree."""
    check_mapping(ROOT, raw)
    check_known(ROOT, raw, FarspanConfig.__struct_fields__)
    kernel = raw.get("kernel", "auto")
    if kernel not in get_args(Kernel):
        refuse(f"{ROOT}.kernel", kernel, one_of(get_args(Kernel)), suggestion(kernel, get_args(Kernel)))
    prefill = raw.get("prefill")
    if prefill is not None:
        path = f"{ROOT}.prefill"
        check_mapping(path, prefill)
        method = prefill.get("method")
        if not isinstance(method, str) or method not in PREFILL_METHODS:
            refuse(f"{path}.method", method, one_of(PREFILL_METHODS), suggestion(method, PREFILL_METHODS))
        check_known(path, prefill, ("method", *PREFILL_METHODS[method].__struct_fields__))
        if method == "block_sparse":
            check_pattern_options(path, prefill)
    if raw.get("string") is not None:
        path = f"{ROOT}.string"
        check_mapping(path, raw["string"])
        check_known(path, raw["string"], StringOptions.__struct_fields__)


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


def check_mapping(path: str, raw: Any) -> None:
    if not isinstance(raw, Mapping):
        refuse(path, raw, "a mapping of option names to values", "Write it as a JSON object")


def check_known(path: str, raw: Mapping[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    for name, value in raw.items():
        if name not in known:
            allowed = f"no option of that name; known here: {', '.join(known) or 'none'}"
            refuse(f"{path}.{name}", value, allowed, suggestion(name, known))


def check_fraction(path: str, value: float, *, zero_allowed: bool, hint: str) -> None:
    if not (0 <= value <= 1 if zero_allowed else 0 < value <= 1):
        refuse(path, value, f"a number in {'[0, 1]' if zero_allowed else '(0, 1]'}", f"Use {hint}")


def check_at_least(path: str, value: int, least: int, *, unit: str, hint: str) -> None:
    if value < least:
        refuse(path, value, f"a whole number of {unit} >= {least}", f"Use {hint}")


def refuse(path: str, value: Any, allowed: str, remedy: str) -> NoReturn:
    """Raise the ConfigError of one option."""
    raise ConfigError(
        f"{path}={value!r}; allowed: {allowed}. {remedy if remedy.endswith(('.', '?')) else remedy + '.'}"
    )


def one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def suggestion(name: Any, known: Iterable[str]) -> str:
    """What to do about an unknown name: the nearest known one, or else its removal."""
    near = difflib.get_close_matches(str(name), tuple(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else "Take one of those, or leave it out."


def describe_type_error(raw: Any, message: str) -> str:
    """Put msgspec's `Expected `float`, got `str` - at `$.prefill.gamma`` into the words of our own refusals."""
    problem, _, location = message.partition(" - at `$")
    names = [name for name in location.rstrip("`").split(".") if name]
    value = raw
    for name in names:
        value = value[name] if isinstance(value, Mapping) and name in value else None
    path = ".".join([ROOT, *names])
    return f"{path}={value!r}; {problem[0].lower()}{problem[1:]}. Give a value of that type."
