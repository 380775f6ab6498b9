"""Every mistake in the options is refused with the option, the value, what is allowed and what to do."""

from typing import Any

import pytest
from farspan.engine_ext.config import (
    BlockSparsePrefill,
    DensePrefill,
    FarspanConfig,
    FlexPrefill,
    StringOptions,
    parse_config,
)
from farspan.engine_ext.errors import ConfigError

ROOT = 'additional_config["farspan"]'


def flex(**options: Any) -> dict[str, Any]:
    return {"prefill": {"method": "flex", **options}}


def block_sparse(**options: Any) -> dict[str, Any]:
    return {"prefill": {"method": "block_sparse", **options}}


MISTAKES = {
    "not-a-mapping": ("flex", "='flex'; allowed: a mapping"),
    "unknown-option": ({"prefil": {}}, ".prefil={}; allowed: no option of that name; known here: kernel, prefill"),
    "unknown-nested-option": (flex(gama=0.9), ".prefill.gama=0.9; allowed: no option of that name"),
    "unknown-kernel": ({"kernel": "fa2"}, ".kernel='fa2'; allowed: one of 'auto', 'triton', 'fa3'"),
    "unknown-method": ({"prefill": {"method": "flx"}}, ".prefill.method='flx'; allowed: one of 'dense', 'flex'"),
    "missing-method": ({"prefill": {"gamma": 0.9}}, ".prefill.method=None; allowed: one of"),
    "wrong-type": (flex(gamma="0.9"), ".prefill.gamma='0.9'; expected `float`, got `str`"),
    "gamma-range": (flex(gamma=1.5), ".prefill.gamma=1.5; allowed: a number in (0, 1]. Use 0.95"),
    "gamma-nan": (flex(gamma=float("nan")), ".prefill.gamma=nan; allowed: a number in (0, 1]"),
    "tau-range": (flex(tau=-0.1), ".prefill.tau=-0.1; allowed: a number in [0, 1]"),
    "min-budget-range": (flex(min_budget=-1), ".prefill.min_budget=-1; allowed: a whole number of tokens >= 0"),
    "budgets-cross": (flex(max_budget=512), ".prefill.max_budget=512; allowed: at least min_budget, which is 1024"),
    "unknown-pattern": (block_sparse(pattern="local"), ".prefill.pattern='local'; allowed: one of 'sink_local'"),
    "block-size": (block_sparse(block_size=32), ".prefill.block_size=32; allowed: 64 or 128 tokens"),
    "no-local-block": (block_sparse(local_blocks=0), ".prefill.local_blocks=0; allowed: a whole number of blocks >= 1"),
    "option-without-effect": (
        block_sparse(stride=4),
        ".prefill.stride=4; allowed: only with pattern strided",
    ),
    "mask-file-missing": (block_sparse(pattern="file"), ".prefill.mask_file=None; allowed: a path when pattern"),
    "mask-file-kind": (block_sparse(pattern="file", mask_file="m.pt"), ".prefill.mask_file='m.pt'; allowed: a path"),
    "shift-fraction": ({"string": {"shift": 1.5}}, ".string.shift=1.5; allowed: a fraction of the trained length"),
    "window-beyond-shift": ({"string": {"shift": 100, "window": 200}}, ".string.window=200; allowed: at most shift"),
    "logit-scale": ({"string": {"logit_scale": 0}}, ".string.logit_scale=0.0; allowed: a finite number above 0"),
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


@pytest.mark.parametrize(
    ("raw", "changes"),
    [(None, False), ({"kernel": "triton"}, False), (flex(), True), (block_sparse(), True), ({"string": {}}, True)],
    ids=["dense", "kernel", "flex", "block_sparse", "string"],
)
def test_what_changes_kv(raw: Any, changes: bool) -> None:
    assert parse_config(raw).changes_kv is changes
