"""From the options of STRING and the model's own rotary embedding to the shift that the kernels apply."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from farspan.engine_ext.config import ROOT, StringOptions
from farspan.engine_ext.errors import ConfigError, UnsupportedModelError
from farspan.kernels.rope_shift import RotaryShift, make_rotary_shift

ROTARY_CLASSES = (
    "RotaryEmbedding",
    "Llama3RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "NTKScalingRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)
"""vLLM's embeddings that turn each pair by position times a constant: a shift is then one more rotation."""


def shift_of_model(
    options: StringOptions, model: torch.nn.Module, layers: Iterable[Any], trained_len: int, device: torch.device
) -> RotaryShift:
    """The one shift that serves all layers.

    layers: the model's attention modules; trained_len: the length in tokens that a fractional shift refers to.
    Raises UnsupportedModelError where positions are not plain rotary ones, ConfigError where the window is too long.
    """
    embeddings = {id(rotary): rotary for rotary in rotary_embeddings(model, layers)}
    if len(embeddings) != 1:
        raise UnsupportedModelError(
            f"the model has {len(embeddings)} rotary embeddings; string supports one that all layers share. "
            "Leave string out."
        )
    (rotary,) = embeddings.values()
    name = type(rotary).__name__
    if name not in ROTARY_CLASSES:
        raise UnsupportedModelError(
            f"positions by {name}; string supports {', '.join(ROTARY_CLASSES)}. Leave string out."
        )
    if name == "YaRNScalingRotaryEmbedding":
        trained_len = rotary.max_position_embeddings  # before scaling
    shift = options.shift if isinstance(options.shift, int) else round(options.shift * trained_len)
    if not options.window <= shift:
        raise ConfigError(
            f"{ROOT}.string.window={options.window!r}; allowed: at most the shift, which is {shift} tokens "
            f"({options.shift} of {trained_len}). Lower window or raise shift."
        )
    return make_rotary_shift(inverse_frequencies(rotary), shift, options.window, rotary.is_neox_style, device)


def rotary_embeddings(model: torch.nn.Module, layers: Iterable[Any]) -> list[Any]:
    """The rotary embedding beside each attention layer. Raises UnsupportedModelError where there is none."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    found = []
    for layer in layers:
        rotary = getattr(parents.get(id(layer)), "rotary_emb", None)
        if rotary is None:
            raise UnsupportedModelError(
                f"layer {layer.layer_name} has no rotary embedding; string shifts rotary positions. Leave string out."
            )
        found.append(rotary)
    return found


def inverse_frequencies(rotary: Any) -> torch.Tensor:
    """[rotary_dim / 2] float64: radians a token, read from a cache that is computed anew in float32.

    The module's own cache may be in half precision. Its angles are whatever the scaling makes of them, and a common
    magnitude (YaRN) cancels. Rows at powers of two hold the exact multiple of the frequency, so that each one halves
    the error of the row before.
    """
    with torch.device("cpu"):
        cos, sin = rotary._compute_cos_sin_cache().double().chunk(2, dim=-1)
    frequency = torch.atan2(sin[1], cos[1])
    row = 2
    while row < cos.shape[0]:
        error = torch.atan2(sin[row], cos[row]) - row * frequency
        frequency += torch.remainder(error + math.pi, 2 * math.pi).sub(math.pi) / row
        row *= 2
    return frequency
