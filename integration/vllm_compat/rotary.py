"""What vLLM's models say of their rotary positions: by configuration before they are loaded, by module after.

vLLM's models rotate queries and keys before attention, by a rotary module next to the attention layer in its parent
module. The module's cosines may be rounded to the model's dtype and carry a magnitude (YaRN, LongRoPE), so the
frequencies are recomputed in float32 by the module's own formula, and checked against its cosines. A magnitude needs
nothing: it is in the queries and keys already, and the extra rotation is a pure one.

This module is the `RotarySource` of `engine_ext.string`. It can go when attention layers know their rotary module.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from farspan.engine_ext.errors import UnsupportedModelError
from farspan.engine_ext.string import Rotation, instead

ROPE_TYPES = ("default", "linear", "ntk", "dynamic", "llama3", "yarn", "longrope", "proportional")
"""vLLM's names of the scalings that rotate by one constant frequency per pair of dimensions."""


def check_rotary(model_config: Any, option: str = "string") -> None:
    """Refuse what a model's configuration shows of positions that cannot be shifted; its layers may show more.

    model_config: vLLM's; option: which one shifts them, for the message. Raises UnsupportedModelError.
    """
    reason = rotary_refusal(model_config, option)
    if reason is not None:
        raise UnsupportedModelError(f"{option}: {model_config.model} {reason}. {instead(option)}")


def rotary_refusal(model_config: Any, option: str = "string") -> str | None:
    config = model_config.hf_text_config
    if model_config.uses_mrope:
        return f"has multimodal rotary positions (mrope), several for each token; {option} shifts one position"
    for parameters in rope_parameters(config):
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            return f"has rotary embeddings of type {rope_type!r}; {option} supports {', '.join(ROPE_TYPES)}"
        if parameters.get("use_fope"):
            return "has Fourier position embeddings, which turn a pair of dimensions by several frequencies"
    if getattr(config, "dual_chunk_attention_config", None) is not None:
        return "has dual-chunk attention, which changes positions itself"
    if 0 in (getattr(config, "no_rope_layers", None) or ()):
        return f"has layers without rotary positions (no_rope_layers); {option} needs them in every layer"
    if not has_rotary_positions(config):
        return "has no rotary positions to shift"
    if model_config.using_transformers_backend():
        return "runs in vLLM's Transformers backend, whose layers do not show their rotary embedding"
    return None


def rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary parameters of a text model's configuration: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]
    yield from nested or ([parameters] if parameters else [])


def has_rotary_positions(config: Any) -> bool:
    """False only where it is certain: every configuration of transformers' own whose model rotates says how.

    `rotary_dim` is the way of GPT-J and CodeGen. Configurations from elsewhere may leave it to their model.
    """
    says_so = next(rope_parameters(config), None) is not None or hasattr(config, "rotary_dim")
    return says_so or not type(config).__module__.startswith("transformers.")


def trained_len(model_config: Any) -> int | None:
    """Tokens that a model was trained at, from its checkpoint's configuration; None where that does not say.

    Overrides of the configuration (`hf_overrides`) stretch a model, they do not train it. The length is the one before
    extension for YaRN and dynamic NTK scaling, which commonly stretch a trained model further, and
    `max_position_embeddings` for all others, llama3 and LongRoPE included, which models are trained with.
    """
    config = checkpoint_config(model_config)
    longest = getattr(config, "max_position_embeddings", None)
    before_extension = {"yarn": "original_max_position_embeddings", "dynamic": "max_trained_positions"}
    lengths = [
        parameters.get(before_extension.get(parameters.get("rope_type", "default"), ""), longest)
        for parameters in rope_parameters(config)
    ]
    return min((length for length in lengths if length is not None), default=longest)


def checkpoint_config(model_config: Any) -> Any:
    """The text model's configuration as the checkpoint has it."""
    overrides = model_config.hf_overrides
    if not overrides:
        return model_config.hf_text_config
    # Without these two a checkpoint may not be readable at all; they say nothing of lengths.
    names = {} if callable(overrides) else {key: overrides.get(key) for key in ("model_type", "architectures")}
    return read_config(
        str(model_config.hf_config_path or model_config.model),
        model_config.trust_remote_code,
        model_config.revision,
        model_config.code_revision,
        model_config.config_format,
        model_config.hf_token,
        names.get("model_type"),
        tuple(names.get("architectures") or ()),
    )


@functools.cache
def read_config(
    path: str,
    trust_remote_code: bool,
    revision: str | None,
    code_revision: str | None,
    config_format: str,
    token: bool | str | None,
    model_type: str | None,
    architectures: tuple[str, ...],
) -> Any:
    """Read a text model's configuration once per process: every layer asks for it, and it may come over a network."""
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    overrides = {"model_type": model_type, "architectures": list(architectures)}
    config = get_config(
        path,
        trust_remote_code,
        revision,
        code_revision,
        config_format,
        hf_overrides_kw={name: value for name, value in overrides.items() if value},
        token=token,
    )
    return get_hf_text_config(config)


def rotation_of_layer(model: torch.nn.Module, layer_name: str, option: str = "string") -> Rotation:
    """How attention layer `layer_name` of a loaded model is rotated. Raises UnsupportedModelError."""
    rotary_emb = find_rotary_emb(model, layer_name, option)
    # Phi3's LongRoPE has no other style and no such attribute.
    is_neox = getattr(rotary_emb, "is_neox_style", True)
    return Rotation(inverse_frequencies(rotary_emb, layer_name, option), is_neox)


def find_rotary_emb(model: torch.nn.Module, layer_name: str, option: str = "string") -> torch.nn.Module:
    """The rotary module that turns the queries of attention layer `layer_name`.

    Raises UnsupportedModelError where there is none next to the layer, or more than one.
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
            f"{option} needs one rotary embedding for each attention layer; {layer_name} ({type(parent).__name__}) "
            f"uses {count} rotary embedding{'s' if len(found) > 1 else ''}. {instead(option)}"
        )
    raise UnsupportedModelError(
        f"{option} needs the module that holds attention layer {layer_name}; {type(model).__name__} has no module with "
        f"such a layer. {instead(option)}"
    )


def inverse_frequencies(rotary_emb: Any, layer_name: str = "the layer", option: str = "string") -> torch.Tensor:
    """[rotary_dim / 2] float32, radians per token, on the CPU: what the module rotates by, its magnitude left out.

    layer_name: for the message. Raises UnsupportedModelError for a module whose rotation is not a constant frequency
    per pair of dimensions times one position (multimodal rotary positions, Fourier and dual-chunk embeddings, …).
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
            f"{option} needs rotary positions of one constant frequency per pair of dimensions; {layer_name} uses "
            f"{type(rotary_emb).__name__}; supported are vLLM's default, linear, NTK, dynamic NTK, llama3, YaRN, "
            f"LongRoPE and Gemma4 rotary embeddings, not multimodal ones (mrope). {instead(option)}"
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
