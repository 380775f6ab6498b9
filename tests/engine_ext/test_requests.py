"""Overrides of single requests and the salts that follow from them."""

from typing import Any

import pytest
from farspan.engine_ext.config import DensePrefill, parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.requests import cache_salt, prefill_of_request

FLEX = parse_config({"prefill": {"method": "flex", "gamma": 0.95}})
DENSE = parse_config(None)


def salt(config: Any, **extra_args: Any) -> str | None:
    return cache_salt(config, prefill_of_request(config, extra_args))


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
    ],
    ids=["method", "method-type", "gamma", "gamma-bool", "gamma-type", "gamma-dense", "name", "other-engine"],
)
def test_bad_overrides_are_refused(config: Any, extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prefill_of_request(config, extra_args)
    assert message in str(caught.value)


def test_exact_kv_has_no_salt() -> None:
    assert salt(DENSE) is None
    assert salt(FLEX, **{"farspan.method": "dense"}) is None


def test_salts_differ_exactly_where_kv_does() -> None:
    base = salt(FLEX)
    assert base is not None
    assert base == salt(FLEX, **{"farspan.gamma": 0.95})
    assert base != salt(FLEX, **{"farspan.gamma": 0.9})
    assert base == salt(parse_config({"kernel": "triton", "prefill": {"method": "flex", "gamma": 0.95}}))
    strings = [salt(parse_config({"string": {"shift": shift}})) for shift in (0.3, 0.33)]
    assert None not in strings
    assert len({base, *strings}) == 3
