"""Every mistake in the options is refused with the option, the value, what is allowed and what to do."""

from typing import Any, get_args

import msgspec
import pytest
from farspan.engine_ext import config as config_module
from farspan.engine_ext.config import (
    PREFILL_METHODS,
    BlockSparsePrefill,
    DensePrefill,
    FarspanConfig,
    FlexPrefill,
    OffloadOptions,
    StringOptions,
    decode_once,
    parse_config,
)
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.ranges import Real, Whole, ranges_of

ROOT = 'additional_config["farspan"]'


def flex(**options: Any) -> dict[str, Any]:
    return {"prefill": {"method": "flex", **options}}


def block_sparse(**options: Any) -> dict[str, Any]:
    return {"prefill": {"method": "block_sparse", **options}}


MISTAKES = {
    "star-graphs-with-offload": (
        {"star": {"graphs": True}, "offload": {}},
        ".star.graphs=True; allowed: False together with offload: a graph would hold the pages of one request",
    ),
    "star-with-cold-decode": (
        {"star": {}, "offload": {"cold_decode": {"method": "select"}}},
        ".offload.cold_decode={'method': 'select'}; allowed: method 'exact' together with star",
    ),
    "star-with-string": ({"star": {}, "string": {}}, ".star={}; allowed: without string: both move positions"),
    "star-option": ({"star": {"timeout": 3}}, ".star.timeout=3; allowed: no option of that name"),
    "star-timeout": ({"star": {"timeout_s": 0}}, ".star.timeout_s=0; allowed: a number of seconds in [0.1, 3600]"),
    "not-a-mapping": ("flex", "='flex'; allowed: a mapping"),
    "unknown-option": (
        {"prefil": {}},
        ".prefil={}; allowed: no option of that name; known here: preset, kernel",
    ),
    "unknown-nested-option": (flex(gama=0.9), ".prefill.gama=0.9; allowed: no option of that name"),
    "unknown-kernel": ({"kernel": "fa2"}, ".kernel='fa2'; allowed: one of 'auto', 'triton', 'fa3'"),
    "unknown-method": ({"prefill": {"method": "flx"}}, ".prefill.method='flx'; allowed: one of 'dense', 'flex'"),
    "missing-method": (
        {"prefill": {"gamma": 0.9}},
        ".prefill.method=None; allowed: one of 'dense', 'flex', 'block_sparse'. Name one beside the others.",
    ),
    "wrong-type": (flex(gamma="0.9"), ".prefill.gamma='0.9'; expected `float`, got `str`"),
    "gamma-range": (flex(gamma=1.5), ".prefill.gamma=1.5; allowed: a number in (0, 1]. Use 0.95"),
    "gamma-nan": (flex(gamma=float("nan")), ".prefill.gamma=nan; allowed: a number in (0, 1]"),
    "tau-range": (flex(tau=-0.1), ".prefill.tau=-0.1; allowed: a number in [0, 1]"),
    "min-budget-range": (
        flex(min_budget=-1),
        ".prefill.min_budget=-1; allowed: a whole number of tokens: 0, or 257 to 16,777,216. Use 1024",
    ),
    "min-budget-without-effect": (
        flex(min_budget=256),
        ".prefill.min_budget=256; allowed: a whole number of tokens: 0, or 257 to 16,777,216. Use 1024",
    ),
    "max-budget-without-effect": (
        flex(max_budget=255, min_budget=0),
        ".prefill.max_budget=255; allowed: a whole number of tokens: 256 to 16,777,216. Use null for no limit.",
    ),
    "fraction-of-a-token": (flex(min_budget=512.5), ".prefill.min_budget=512.5; allowed: a whole number of tokens"),
    "selection": (
        flex(selection="tile_row"),
        ".prefill.selection='tile_row'; allowed: one of 'tile_rows', 'flexprefill'",
    ),
    "tau-of-the-other": (flex(tau=0.2), ".prefill.tau=0.2; allowed: only with selection 'flexprefill'. Remove tau"),
    "low-max-budget": (flex(min_budget=0, max_budget=256), ".prefill.max_budget=256; allowed: at least 384 with"),
    "rows": (flex(coverage_rows=20_000), ".prefill.coverage_rows=20000; allowed: a whole number of rows: 0 to 256."),
    "chunk-length": (flex(min_chunk_len=-1), ".prefill.min_chunk_len=-1; allowed: a whole number of tokens: 0 to 16,"),
    "beyond-a-float": (flex(gamma=10**400), ".prefill.gamma=1000"),
    "budgets-cross": (flex(max_budget=512), ".prefill.max_budget=512; allowed: at least min_budget, which is 1024"),
    "unknown-pattern": (block_sparse(pattern="local"), ".prefill.pattern='local'; allowed: one of 'sink_local'"),
    "block-size": (block_sparse(block_size=32), ".prefill.block_size=32; allowed: 64 or 128 tokens"),
    "no-local-block": (
        block_sparse(local_blocks=0),
        ".prefill.local_blocks=0; allowed: a whole number of blocks: 1 to 1",
    ),
    "option-without-effect": (
        block_sparse(stride=4),
        ".prefill.stride=4; allowed: only with pattern strided",
    ),
    "mask-file-missing": (block_sparse(pattern="file"), ".prefill.mask_file=None; allowed: a path when pattern"),
    "mask-file-kind": (block_sparse(pattern="file", mask_file="m.pt"), ".prefill.mask_file='m.pt'; allowed: a path"),
    "shift-fraction": ({"string": {"shift": 1.5}}, ".string.shift=1.5; allowed: a fraction of the trained length"),
    "window-beyond-shift": ({"string": {"shift": 100, "window": 200}}, ".string.window=200; allowed: at most shift"),
    "shift-zero": (
        {"string": {"shift": 0}},
        ".string.shift=0; allowed: a fraction of the trained length in (0, 1), or a whole number of tokens: 1 to 16,",
    ),
    "logit-scale": ({"string": {"logit_scale": 0}}, ".string.logit_scale=0; allowed: a number in [0.1, 10]. Use 1.0."),
    "logit-scale-huge": ({"string": {"logit_scale": 1e300}}, ".string.logit_scale=1e+300; allowed: a number in [0.1"),
    "host-memory": ({"offload": {"host_memory": 0}}, ".offload.host_memory=0; allowed: a number in (0, 65536]"),
    "host-memory-in-words": (
        {"offload": {"host_memory": "64GiB"}},
        ".offload.host_memory='64GiB'; allowed: a number in (0, 65536], or \"auto\"",
    ),
    "hot-heads": ({"offload": {"hot_heads": 0.5}}, ".offload.hot_heads=0.5; allowed: a whole number of KV heads: 0"),
    "hot-heads-of-a-layer": ({"offload": {"hot_heads": [1, -1]}}, ".offload.hot_heads[1]=-1; allowed: a whole number"),
    "group-size": ({"offload": {"group_size": 0}}, ".offload.group_size=0; allowed: a whole number of KV heads: 1 to"),
    "offload-option": ({"offload": {"slots": 3}}, ".offload.slots=3; allowed: no option of that name"),
    "offload-switch": ({"offload": True}, ".offload=True; allowed: a mapping"),
    "cold-decode": (
        {"offload": {"cold_decode": {"method": "exakt"}}},
        ".offload.cold_decode.method='exakt'; allowed: one of 'exact', 'select'. Did you mean 'exact'?",
    ),
    "cold-decode-exact": (
        {"offload": {"cold_decode": {"method": "exact", "coverage": 0.9}}},
        ".offload.cold_decode.coverage=0.9; allowed: no option of that name",
    ),
    "cold-coverage": (
        {"offload": {"cold_decode": {"method": "select", "coverage": 0}}},
        ".offload.cold_decode.coverage=0; allowed: a number in (0, 1]",
    ),
    "cold-decode-word": ({"offload": {"cold_decode": "select"}}, ".offload.cold_decode='select'; allowed: a mapping"),
    "cold-decode-with-string": (
        {"string": {}, "offload": {"cold_decode": {"method": "select"}}},
        ".offload.cold_decode={'method': 'select'}; allowed: method 'exact' together with string",
    ),
    "fa3-with-string": ({"kernel": "fa3", "string": {}}, ".kernel='fa3'; allowed: auto or triton together with string"),
}


@pytest.mark.parametrize(("raw", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_refused_with_a_sentence(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    text = str(caught.value)
    assert text.startswith(ROOT + message)
    assert text[-1] in ".?"
    assert ". " in text, "a remedy follows what is allowed"


@pytest.mark.parametrize(
    ("raw", "near"),
    [({"kernl": "auto"}, "kernel"), (flex(gama=0.9), "gamma"), ({"string": {"shft": 0.3}}, "shift")],
    ids=["kernel", "gamma", "shift"],
)
def test_nearest_option_is_named(raw: Any, near: str) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean '{near}'\\?"):
        parse_config(raw)


OPTION_STRUCTS = (FarspanConfig, *PREFILL_METHODS.values(), StringOptions, OffloadOptions)
ROOMS = {StringOptions: "string", OffloadOptions: "offload"}


def numeric_fields(options: type[msgspec.Struct]) -> list[str]:
    """Names of the fields that hold numbers, by their types alone."""

    def is_number(kind: Any) -> bool:
        return kind in (int, float) or any(is_number(member) for member in get_args(kind))

    return [field.name for field in msgspec.structs.fields(options) if is_number(field.type)]


def test_the_walk_finds_the_numbers() -> None:
    assert numeric_fields(StringOptions) == ["shift", "window", "logit_scale"]
    assert numeric_fields(OffloadOptions) == ["host_memory", "hot_heads", "group_size"]
    assert numeric_fields(FarspanConfig) == []


@pytest.mark.parametrize("options", OPTION_STRUCTS, ids=lambda options: options.__name__)
def test_every_number_has_both_bounds(options: type[msgspec.Struct]) -> None:
    assert list(ranges_of(options)) == numeric_fields(options)
    for name, ranges in ranges_of(options).items():
        default = next(field.default for field in msgspec.structs.fields(options) if field.name == name)
        assert default in (None, "auto") or any(default in allowed for allowed in ranges), name
        for value in (-1, 2**63, 2**70, -(10**300), 1e300, -1e-300, float("inf"), float("nan"), True, False):
            assert not any(value in allowed for allowed in ranges), (name, value)


def raw_with(options: type[msgspec.Struct], name: str, value: Any) -> dict[str, Any]:
    """Options as a user writes them, with one field set."""
    if options in ROOMS:
        return {ROOMS[options]: {name: value}}
    method = {"flex": flex, "block_sparse": block_sparse}[str(options.__struct_config__.tag)]
    reader = "strided" if name in ("stride", "local_blocks") else "sink_local"
    return method(**{"pattern": reader} if method is block_sparse else {}, **{name: value})


NUMBERS = [(options, name) for options in OPTION_STRUCTS for name in numeric_fields(options)]


@pytest.mark.parametrize(("options", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
@pytest.mark.parametrize("value", [True, False, 2**63, 2**70, 1e300, float("nan"), float("inf"), -1])
def test_numbers_without_sense_are_refused_everywhere(options: type[msgspec.Struct], name: str, value: Any) -> None:
    room = ROOMS.get(options, "prefill")
    with pytest.raises(ConfigError) as caught:
        parse_config(raw_with(options, name, value))
    assert str(caught.value).startswith(f"{ROOT}.{room}.{name}={value!r}; allowed: ")
    with pytest.raises(ConfigError):
        options(**{name: value}).check(room)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "interval"),
    [
        (Whole(257, 999, "tokens", "", besides=0), (0, 257, 999), (-1, 1, 256, 1000, 300.0, "300"), "0, or 257 to 999"),
        (Real(0, 1, "", least_included=False), (1e-9, 1, 1.0), (0, -0.1, 1.1, "1"), "(0, 1]"),
        (Real(0, 1, "", most_included=False), (0, 0.5), (1, 1.0), "[0, 1)"),
    ],
    ids=["besides", "least-excluded", "most-excluded"],
)
def test_ends_of_ranges(allowed: Any, inside: tuple[Any, ...], outside: tuple[Any, ...], interval: str) -> None:
    assert allowed.interval == interval
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_options_are_decoded_once_per_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(config_module, "_decoded", {})
    monkeypatch.setattr(config_module, "parse_config", lambda raw: calls.append(raw) or parse_config(raw))
    tree = flex(gamma=0.9)
    assert decode_once(tree) is decode_once(flex(gamma=0.9))
    assert len(calls) == 1
    tree["prefill"]["gamma"] = 0.8
    changed = decode_once(tree).prefill
    assert isinstance(changed, FlexPrefill)
    assert changed.gamma == 0.8
    # 1 == 1.0 == True in Python, but they are different options.
    decode_once({"string": {"shift": 1, "window": 1}})
    with pytest.raises(ConfigError, match=r"shift=1\.0; allowed"):
        decode_once({"string": {"shift": 1.0, "window": 1}})


def test_defaults() -> None:
    assert parse_config(None) == parse_config({}) == FarspanConfig()
    assert parse_config({"prefill": {"method": "dense"}}).prefill == DensePrefill()


def test_values_are_taken() -> None:
    config = parse_config({"kernel": "triton", **flex(gamma=0.9, min_seq_len=0, min_chunk_len=0)})
    assert config == FarspanConfig(kernel="triton", prefill=FlexPrefill(gamma=0.9, min_seq_len=0, min_chunk_len=0))
    assert parse_config(block_sparse(pattern="strided", stride=4)).prefill == BlockSparsePrefill(
        pattern="strided", stride=4
    )
    assert parse_config({"string": {"shift": 4096}}).string == StringOptions(shift=4096)
    assert parse_config({**flex(), "string": {}}).string == StringOptions()
    assert parse_config({"offload": {}}).offload == OffloadOptions()
    raw = {"host_memory": 32, "hot_heads": [1, 0], "group_size": 2}
    assert parse_config({"offload": raw}).offload == OffloadOptions(host_memory=32.0, hot_heads=(1, 0), group_size=2)


@pytest.mark.parametrize(
    ("raw", "changes"),
    [
        (None, False),
        ({"kernel": "triton"}, False),
        ({"offload": {}}, False),
        (flex(), True),
        (block_sparse(), True),
        ({"string": {}}, True),
    ],
    ids=["dense", "kernel", "offload", "flex", "block_sparse", "string"],
)
def test_what_changes_kv(raw: Any, changes: bool) -> None:
    assert parse_config(raw).changes_kv is changes
