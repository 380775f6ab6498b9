"""From the options of `string` to the turn of a layer, with made-up rotary positions."""

from types import SimpleNamespace

import pytest
import torch
from farspan.engine_ext import string
from farspan.engine_ext.config import StringOptions
from farspan.engine_ext.errors import ConfigError, UnsupportedModelError
from farspan.engine_ext.string import Rotation, check_string, shift_tokens, string_turn_for_layer


class Rotary:
    """Models that were trained at 4096 tokens; the positions of the one named "odd" cannot be shifted."""

    def check_rotary(self, model_config: SimpleNamespace) -> None:
        if model_config.model == "odd":
            raise UnsupportedModelError("odd")

    def trained_len(self, model_config: SimpleNamespace) -> int:
        return 4096

    def rotation_of_layer(self, model: torch.nn.Module, layer_name: str) -> Rotation:
        return Rotation(torch.ones(16), is_neox=False)


@pytest.fixture(autouse=True)
def rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(string, "_source", Rotary())


@pytest.mark.parametrize(
    ("options", "trained_len", "expected"),
    [
        (StringOptions(shift=0.25), 4096, 1024),
        (StringOptions(shift=3000), 4096, 3000),
        (StringOptions(shift=3000), None, 3000),
    ],
    ids=["fraction", "tokens", "tokens-of-unknown"],
)
def test_shift_in_tokens(options: StringOptions, trained_len: int | None, expected: int) -> None:
    assert shift_tokens(options, trained_len) == expected


def test_refuses_a_fraction_that_means_nothing() -> None:
    with pytest.raises(ConfigError, match="Give shift in tokens"):
        shift_tokens(StringOptions(shift=0.3), None)
    with pytest.raises(ConfigError, match=r"Raise shift or lower window"):
        shift_tokens(StringOptions(shift=0.3), 256)


def test_engines_are_checked_by_their_configuration() -> None:
    check_string(SimpleNamespace(model="m"), StringOptions())
    with pytest.raises(ConfigError, match="4096 tokens, is 40 tokens, less than window=128"):
        check_string(SimpleNamespace(model="m"), StringOptions(shift=0.01))
    with pytest.raises(UnsupportedModelError, match="odd"):
        check_string(SimpleNamespace(model="odd"), StringOptions())


def test_turn_of_a_layer() -> None:
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(), device_config=SimpleNamespace(device_type="cpu"))
    shift = string_turn_for_layer(torch.nn.Module(), vllm_config, "x", StringOptions(shift=0.5, window=100))
    assert (shift.slope, shift.offset, shift.is_neox, shift.rotary_dim) == (1, 1 - 2048, False, 32)
