"""From a loaded model to shifted rotary positions: which frequencies a layer rotates by, and how long it was trained.

vLLM's models rotate queries and keys before attention, by a rotary module that sits beside the attention layer in its
parent module. The module's cosines may be rounded to the model's dtype and carry a magnitude (YaRN, LongRoPE), so the
frequencies are recomputed in float32 by the module's own formula, and checked against its cosines. A magnitude needs
nothing: it is in the queries and keys already, and the extra rotation is a pure one.
"""

from typing import Any

import torch
from farspan.engine_ext.config import StringOptions
from farspan.engine_ext.errors import ConfigError, UnsupportedModelError
from farspan.kernels.rotary_turn import Turn, make_string_turn

INSTEAD = "Leave out the option string."


def string_turn_for_layer(model: torch.nn.Module, vllm_config: Any, layer_name: str, options: StringOptions) -> Turn:
    """The shift of one attention layer of a loaded model, on the engine's device.

    Raises UnsupportedModelError where the layer's positions cannot be shifted exactly, ConfigError where the option
    shift and the model's trained length do not fit each other.
    """
    rotary_emb = find_rotary_emb(model, layer_name)
    frequencies = inverse_frequencies(rotary_emb, layer_name)
    shift = shift_tokens(options, rotary_emb, vllm_config.model_config.hf_text_config)
    is_neox = getattr(rotary_emb, "is_neox_style", True)  # Phi3's LongRoPE has no other style and no such attribute.
    device = torch.device(vllm_config.device_config.device_type)
    return make_string_turn(frequencies, shift, options.window, is_neox, device)


def find_rotary_emb(model: torch.nn.Module, layer_name: str) -> torch.nn.Module:
    """The rotary module that turns the queries of attention layer `layer_name`.

    Raises UnsupportedModelError where there is none beside the layer, or more than one.
    """
    from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    for parent in model.modules():
        if not any(getattr(child, "layer_name", None) == layer_name for child in parent.children()):
            continue
        # A module that both layers share, or that has two names, is one module: children() does not repeat it.
        found = [
            child
            for child in parent.children()
            if isinstance(child, (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding))
        ]
        if len(found) == 1 and getattr(parent, "use_rope", True) and not getattr(parent, "nope", False):
            return found[0]
        count = len(found) if len(found) > 1 else "no"
        raise UnsupportedModelError(
            f"string needs one rotary embedding for each attention layer; {layer_name} ({type(parent).__name__}) uses "
            f"{count} rotary embedding{'s' if len(found) > 1 else ''}. {INSTEAD}"
        )
    raise UnsupportedModelError(
        f"string needs the module that holds attention layer {layer_name}; {type(model).__name__} has no module with "
        f"such a layer. {INSTEAD}"
    )


def inverse_frequencies(rotary_emb: Any, layer_name: str = "the layer") -> torch.Tensor:
    """[rotary_dim / 2] float32, radians a token, on the CPU: what the module rotates by, its magnitude left out.

    layer_name: for the message. Raises UnsupportedModelError for a module whose rotation is not a constant frequency a
    pair of dimensions times one position (multimodal rotary positions, Fourier and dual-chunk embeddings, …).
    """
    from vllm.model_executor.layers import rotary_embedding as rope

    with torch.device("cpu"):
        frequencies: torch.Tensor | None = None
        # Exact classes: a subclass may rotate by other rules.
        match type(rotary_emb):
            case rope.RotaryEmbedding | rope.Llama3RotaryEmbedding | rope.NTKScalingRotaryEmbedding:
                frequencies = rotary_emb._compute_inv_freq(rotary_emb.base)
            case rope.Gemma4RotaryEmbedding:
                frequencies = rotary_emb._compute_inv_freq(rotary_emb.base)
            case rope.LinearScalingRotaryEmbedding if len(rotary_emb.scaling_factors) == 1:
                frequencies = rotary_emb._compute_inv_freq(rotary_emb.base) / rotary_emb.scaling_factors[0]
            case rope.DynamicNTKScalingRotaryEmbedding | rope.DynamicNTKAlphaRotaryEmbedding:
                frequencies = rotary_emb._compute_inv_freq(dynamic_base(rotary_emb))
            case rope.YaRNScalingRotaryEmbedding:
                frequencies = rotary_emb._compute_inv_freq(rotary_emb.scaling_factor)
            case rope.Phi3LongRoPEScaledRotaryEmbedding:
                factors = rotary_emb.long_factor if rotary_emb.use_long_rope else rotary_emb.short_factor
                frequencies = rotary_emb._compute_inv_freq(factors)
    if frequencies is None or not agrees_with_cache(rotary_emb, frequencies):
        raise UnsupportedModelError(
            f"string needs rotary positions of one constant frequency a pair of dimensions; {layer_name} uses "
            f"{type(rotary_emb).__name__}; supported are vLLM's default, linear, NTK, dynamic NTK, llama3, YaRN, "
            f"LongRoPE and Gemma4 rotary embeddings, not multimodal ones (mrope). {INSTEAD}"
        )
    return frequencies


def dynamic_base(rotary_emb: Any) -> float:
    """The base that dynamic NTK scaling fixes for the model's maximum length; alpha scaling gives the factor itself."""
    stretch = getattr(rotary_emb, "scaling_alpha", None)
    if stretch is None:
        trained_share = rotary_emb.max_position_embeddings / rotary_emb.max_trained_positions
        stretch = rotary_emb.scaling_factor * trained_share - (rotary_emb.scaling_factor - 1)
    return rotary_emb.base * stretch ** (rotary_emb.rotary_dim / (rotary_emb.rotary_dim - 2))


def agrees_with_cache(rotary_emb: Any, frequencies: torch.Tensor) -> bool:
    """Whether the module's own cosines and sines, their magnitude divided out, are those of the frequencies."""
    cache = getattr(rotary_emb, "cos_sin_cache", None)
    if cache is None:
        cache = rotary_emb.long_short_cos_sin_cache
        first = rotary_emb.original_max_position_embeddings if rotary_emb.use_long_rope else 0
        cache = cache[first:]
    if cache.shape[1] != 2 * len(frequencies):
        return False
    # Close to the start, where float32 and float64 angles cannot differ.
    positions = torch.tensor([0, 1, 2, 7])[: len(cache)]
    cos, sin = cache[positions.to(cache.device)].double().cpu().chunk(2, dim=-1)
    magnitude = (cos**2 + sin**2).sqrt()
    angle = positions[:, None] * frequencies.double()
    # Two roundings, of the component and of the magnitude.
    tolerance = 4 * torch.finfo(cache.dtype).eps
    difference = torch.stack([cos / magnitude - angle.cos(), sin / magnitude - angle.sin()]).abs().max()
    return bool(difference <= tolerance)


def shift_tokens(options: StringOptions, rotary_emb: Any, hf_text_config: Any) -> int:
    """S in tokens: given so, or the fraction of the length that the model was trained at.

    That length is the one before extension for YaRN and dynamic NTK scaling, which commonly stretch a trained model
    further, and `max_position_embeddings` for all others, llama3 and LongRoPE included, which models are trained with.
    Raises ConfigError where the result is below the window, or the length is not known.
    """
    from vllm.model_executor.layers import rotary_embedding as rope

    if isinstance(options.shift, int):
        return options.shift
    trained_length: int | None
    if isinstance(rotary_emb, rope.YaRNScalingRotaryEmbedding):
        trained_length = rotary_emb.max_position_embeddings  # vLLM passes the original length here.
    elif isinstance(rotary_emb, rope.DynamicNTKScalingRotaryEmbedding):
        trained_length = rotary_emb.max_trained_positions
    else:
        trained_length = getattr(hf_text_config, "max_position_embeddings", None)
    if trained_length is None:
        raise ConfigError(
            f"string.shift={options.shift} is a fraction of the trained length, but the model's configuration has no "
            "max_position_embeddings. Give shift in tokens."
        )
    shift = int(options.shift * trained_length)
    if shift < max(options.window, 1):
        raise ConfigError(
            f"string.shift={options.shift} of the trained length, {trained_length} tokens, is {shift} tokens, less "
            f"than window={options.window}; a longer window would move keys further away. Raise shift or lower window."
        )
    return shift
