"""Overrides of single requests and the salts that follow from them."""

from pathlib import Path
from typing import Any

import pytest
from farspan.engine_ext.config import DensePrefill, parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.requests import cache_salt, digest_of_file, options_digest, prefill_of_request

FLEX = parse_config({"prefill": {"method": "flex", "gamma": 0.95}})
DENSE = parse_config(None)


def digest(config: Any, **extra_args: Any) -> str | None:
    return options_digest(config, prefill_of_request(config, extra_args))


def test_no_override_keeps_the_engine_options() -> None:
    assert prefill_of_request(FLEX, None) is FLEX.prefill
    assert prefill_of_request(FLEX, {"somebody.else": 1}) is FLEX.prefill


def test_overrides() -> None:
    assert prefill_of_request(FLEX, {"farspan.method": "dense"}) == DensePrefill()
    assert prefill_of_request(FLEX, {"farspan.gamma": 0.8}).gamma == 0.8
    assert prefill_of_request(FLEX, {"farspan.method": "flex", "farspan.gamma": 1}).gamma == 1.0


@pytest.mark.parametrize(
    ("config", "extra_args", "message"),
    [
        (FLEX, {"farspan.method": "block_sparse"}, "farspan.method='block_sparse'; allowed: 'dense' or 'flex'"),
        (FLEX, {"farspan.method": 3}, "farspan.method=3; allowed: 'dense' or 'flex'"),
        (FLEX, {"farspan.gamma": 1.5}, "farspan.gamma=1.5; allowed: a number in"),
        (FLEX, {"farspan.gamma": True}, "farspan.gamma=True; allowed: a number in"),
        (FLEX, {"farspan.gamma": "0.9"}, "farspan.gamma='0.9'; allowed: a number in"),
        (FLEX, {"farspan.method": "dense", "farspan.gamma": 0.9}, "only where the request prefills with method 'flex'"),
        (FLEX, {"farspan.gama": 0.9}, "farspan.gama=0.9; a request can set farspan.method and farspan.gamma"),
        (DENSE, {"farspan.method": "flex"}, "farspan.method='flex'; allowed: 'dense'"),
        (FLEX, {"farspan_gamma": 0.9}, "farspan_gamma=0.9; a request can set farspan.method and farspan.gamma"),
        (FLEX, {"Farspan.gamma": 0.9}, "Did you mean 'farspan.gamma'?"),
        (FLEX, {"farspan": {"gamma": 0.9}}, "farspan={'gamma': 0.9}; a request can set"),
    ],
    ids=[
        "method",
        "method-type",
        "gamma",
        "gamma-bool",
        "gamma-type",
        "gamma-dense",
        "name",
        "other-engine",
        "underscore",
        "case",
        "nested",
    ],
)
def test_bad_overrides_are_refused(config: Any, extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prefill_of_request(config, extra_args)
    assert message in str(caught.value)


def test_exact_kv_has_no_digest() -> None:
    assert digest(DENSE) is None
    assert digest(FLEX, **{"farspan.method": "dense"}) is None


def test_digests_differ_with_what_shapes_the_kv() -> None:
    base = digest(FLEX)
    assert base is not None
    assert base == digest(FLEX, **{"farspan.gamma": 0.95})
    assert base != digest(FLEX, **{"farspan.gamma": 0.9})
    assert base == digest(parse_config({"kernel": "triton", "prefill": {"method": "flex", "gamma": 0.95}}))
    with_string = [digest(parse_config({"string": {"shift": shift}})) for shift in (0.3, 0.33)]
    assert None not in with_string
    assert len({base, *with_string}) == 3


def test_digest_is_of_a_masks_content(tmp_path: Path) -> None:
    def digest_of(name: str, content: bytes) -> str | None:
        path = tmp_path / name
        path.write_bytes(content)
        digest_of_file.cache_clear()
        return digest(parse_config({"prefill": {"method": "block_sparse", "pattern": "file", "mask_file": str(path)}}))

    first = digest_of("a.npy", b"1")
    assert first == digest_of("b.npy", b"1")
    assert first != digest_of("a.npy", b"2")


def test_salts_are_of_the_pair() -> None:
    pairs = [(user, digest) for user in (None, "u", "v") for digest in (None, "d", "e")]
    salts = {pair: cache_salt(*pair) for pair in pairs}
    assert salts[None, None] is None
    assert len(set(salts.values())) == len(pairs)
    forged = {cache_salt(salt, None) for salt in salts.values() if salt is not None}
    assert not forged & set(salts.values())
    assert cache_salt("", "d") == cache_salt(None, "d")
