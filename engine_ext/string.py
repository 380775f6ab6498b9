"""The option `string`: from S and W in the user's terms to the turn of one layer's queries."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from farspan.engine_ext.config import StringOptions
from farspan.engine_ext.errors import ConfigError
from farspan.kernels.rotary_turn import Turn, make_string_turn


def instead(option: str) -> str:
    """What to do where a model's positions cannot be shifted."""
    return f"Leave out the option {option}."


@dataclass(frozen=True)
class Rotation:
    """How a layer's queries and keys are rotated by their positions."""

    inv_freq: torch.Tensor
    """[rotary_dim / 2] float32, radians per token, on the CPU; a magnitude of the cosines and sines is left out."""
    is_neox: bool
    """True: component i pairs with i + rotary_dim / 2. False: component 2i pairs with 2i + 1."""


class RotarySource(Protocol):
    """What is to be known of a model's rotary positions; told by whoever knows the engine's models."""

    def check_rotary(self, model_config: Any, option: str = "string") -> None:
        """Raise UnsupportedModelError where the model's configuration shows that they cannot be shifted exactly."""
        ...

    def trained_len(self, model_config: Any) -> int | None:
        """Tokens that the model was trained at; None where its checkpoint does not say."""
        ...

    def rotation_of_layer(self, model: torch.nn.Module, layer_name: str, option: str = "string") -> Rotation:
        """Of one attention layer of a loaded model. Raises UnsupportedModelError where they cannot be shifted."""
        ...


_source: RotarySource | None = None


def set_rotary_source(source: RotarySource) -> None:
    """Tell where to learn of a model's rotary positions."""
    global _source
    _source = source


def rotary_source() -> RotarySource:
    assert _source is not None, "the plugin's register() sets it"
    return _source


def check_string(model_config: Any, options: StringOptions) -> None:
    """Refuse, before a model is loaded, what its configuration shows that `string` cannot do.

    model_config: vLLM's. Raises UnsupportedModelError or ConfigError.
    """
    rotary_source().check_rotary(model_config)
    shift_tokens(options, rotary_source().trained_len(model_config))


def string_turn_for_layer(model: torch.nn.Module, vllm_config: Any, layer_name: str, options: StringOptions) -> Turn:
    """The turn of one attention layer of a loaded model, on the engine's device.

    Raises UnsupportedModelError where the layer's positions cannot be shifted exactly, ConfigError where the option
    shift and the model's trained length do not fit each other.
    """
    rotation = rotary_source().rotation_of_layer(model, layer_name)
    shift = shift_tokens(options, rotary_source().trained_len(vllm_config.model_config))
    device = torch.device(vllm_config.device_config.device_type)
    return make_string_turn(rotation.inv_freq, shift, options.window, rotation.is_neox, device)


def shift_tokens(options: StringOptions, trained_len: int | None) -> int:
    """S in tokens: given so, or the fraction of the length that the model was trained at.

    trained_len: tokens; None if it is not known. Raises ConfigError where the result is below the window, or the length
    is needed and not known.
    """
    if isinstance(options.shift, int):
        return options.shift
    if trained_len is None:
        raise ConfigError(
            f"string.shift={options.shift} is a fraction of the trained length, but the checkpoint's configuration has "
            "no max_position_embeddings. Give shift in tokens."
        )
    shift = int(options.shift * trained_len)
    if shift < options.window:
        raise ConfigError(
            f"string.shift={options.shift} of the trained length, {trained_len} tokens, is {shift} tokens, less "
            f"than window={options.window}; a longer window would move keys further away. Raise shift or lower window."
        )
    return shift
