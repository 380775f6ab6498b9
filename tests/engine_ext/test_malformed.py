"""Two hundred malformed option trees and as many malformed requests: each is refused with a sentence, none crashes."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
from farspan.engine_ext.config import FarspanConfig, parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.refusing import ROOT
from farspan.engine_ext.requests import prefill_of_request, shard_of_request

NUM_CASES = 200
VALID: list[dict[str, Any]] = [
    {"preset": "fast", "prefill": {"gamma": 0.8}},
    {"preset": "max-context", "offload": {"hot_heads": [1, 0]}},
    {"kernel": "triton", "prefill": {"method": "dense"}},
    {
        "prefill": {
            "method": "flex", "selection": "flexprefill", "gamma": 0.9, "tau": 0.2, "min_budget": 512,
            "max_budget": 4096, "share_kv_group": True, "min_seq_len": 0, "min_chunk_len": 9, "coverage_rows": 3,
        },
    },
    {"prefill": {"method": "block_sparse", "pattern": "strided", "block_size": 64, "local_blocks": 3, "stride": 4}},
    {"prefill": {"method": "block_sparse", "pattern": "file", "mask_file": "mask.npy"}},
    {"string": {"shift": 0.4, "window": 64, "logit_scale": 1.1}, "offload": {"host_memory": 4, "group_size": 2}},
    {"star": {"timeout_s": 3.5, "graphs": False}},
]  # fmt: skip
JUNK: list[Any] = [
    {"x": 1}, {"gamma": None}, {1: 2}, [["a"]], ["auto"], [], "", "maybe", "0.5", "auto ", "\x00", "γ", (), (1, "2"),
    -1, -0.5, 10**12, 2.0**80, float("nan"), float("-inf"), {}, b"0.9",
]  # fmt: skip
"""Values that no option takes, but for `TAKEN`."""
TAKEN: dict[str, dict[str, Any]] = {"string": {}, "star": {}, "offload": {}}
"""By option: the junk that it takes after all."""
NAMES = ("gama", "Gamma", "farspan", "x", "prefil", " gamma", "", "метод", "preset ")


def paths_of(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from paths_of(value, (*path, name))


def corrupt(generator: random.Random) -> Any:
    """A valid tree with one mistake: a value that the option does not take, or a name that does not exist."""
    tree = copy.deepcopy(generator.choice(VALID))
    *outer, name = generator.choice(list(paths_of(tree)))
    where = tree
    for each in outer:
        where = where[each]
    if generator.random() < 0.25:
        where[generator.choice(NAMES)] = generator.choice([1, 0.9, "flex", None, {}])
        return tree
    taken = TAKEN.get(name, ())
    where[name] = generator.choice(
        [value for value in JUNK if not any(value is each or value == each for each in taken)]
    )
    return tree


def test_the_trees_are_valid_before() -> None:
    for tree in VALID:
        parse_config(tree)


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_options(seed: int) -> None:
    tree = corrupt(random.Random(seed))
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    message = str(caught.value)
    assert message.startswith(ROOT), tree
    assert message[-1] in ".?", message


ENGINES = [parse_config(tree) for tree in ({}, {"preset": "fast"}, VALID[4], {"string": {}})]
REQUEST_NAMES = (
    "farspan.method", "farspan.gamma", "farspan.gama", "farspan", "farspan_gamma", "Farspan.Gamma", "FARSPAN.METHOD",
    "farspan.prefill", "farspan.gamma ", "farspan.string", "farspan.star",
)  # fmt: skip


def admit(config: FarspanConfig, extra_args: dict[str, Any]) -> None:
    """Decode a request's options, as vLLM's front end and core have it done."""
    shard_of_request(config, extra_args, 16, 100)
    prefill_of_request(config, extra_args)


@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_requests(seed: int) -> None:
    generator = random.Random(seed)
    config = generator.choice(ENGINES)
    extra_args = {generator.choice(REQUEST_NAMES): generator.choice([*JUNK, None, True, False, 0, 1.5, 2, "flexx"])}
    with pytest.raises(ConfigError) as caught:
        admit(config, extra_args)
    message = str(caught.value)
    assert next(iter(extra_args)) in message
    assert message[-1] in ".?", message
