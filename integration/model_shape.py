"""A model's shape from its configuration alone: no weights, no GPU, no vLLM."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farspan.engine_ext.errors import UnsupportedModelError
from farspan.scheduler.footprint import ModelShape

ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
EXTRAPOLATING_ROPE = ("linear", "dynamic")
"""Kinds of rotary scaling whose factor vLLM multiplies the model's positions by; others have it in them."""
SCALE_BITS = 0.25
"""Scales and zero points of weights that are quantized in groups, for each weight."""


@dataclass(frozen=True)
class ModelInfo:
    """What `farspan plan` knows of a model."""

    shape: ModelShape
    dtype: str
    """Of activations and KV: a key of ELEMENT_BYTES."""
    layer_bits: float | None
    """Of each parameter in the layers; None where the kind of quantization is not known."""
    quantization: str | None
    file_bytes: int | None
    """Weights in the model's own folder, where there are any."""


def read_model(name: str, dtype: str = "auto", overrides: Mapping[str, Any] | None = None) -> ModelInfo:
    """Read config.json and count parameters on a skeleton without memory.

    name: a folder with config.json, or a name on the model hub. overrides: of values in the configuration, as vLLM's
    --hf-overrides. Raises UnsupportedModelError.
    """
    config = read_config(name, overrides or {})
    check_config(name, config)
    quantization = getattr(config, "quantization_config", None)
    layer_bits: float | None = None
    method = None
    dtype = dtype_of(config) if dtype == "auto" else dtype
    if quantization:
        quantization = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
        method = str(quantization.get("quant_method", "unknown"))
        layer_bits = quantized_bits(quantization)
    else:
        layer_bits = 8.0 * ELEMENT_BYTES[dtype]
    return ModelInfo(shape_of(name, config), dtype, layer_bits, method, file_bytes_of(Path(name)))


def read_config(name: str, overrides: Mapping[str, Any]) -> Any:
    """The text part of a model's configuration. Raises UnsupportedModelError where there is none."""
    from transformers import AutoConfig

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UnsupportedModelError(f"{name} is a folder without config.json. Give the folder that has the model's.")
    try:
        config = AutoConfig.from_pretrained(name, **overrides)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UnsupportedModelError(
            f"{name}: no configuration that transformers can read ({reason}). Give a folder with config.json, or a "
            "name on the model hub, which must be within reach or in the local cache."
        ) from error
    return config.get_text_config(decoder=True)


def check_config(name: str, config: Any) -> None:
    """Refuse models that the backend refuses, as far as the configuration shows it."""
    from farspan.engine_ext.support import head_size_refusal, sliding_window_refusal

    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("an encoder and a decoder; farspan supports decoders with plain GQA.")
    if getattr(config, "kv_lora_rank", None):
        reasons.append("multi-head latent attention (MLA); farspan supports decoders with plain GQA.")
    for field in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if not isinstance(getattr(config, field, None), int):
            reasons.append(f"no {field} in its configuration; farspan plans for decoders with plain GQA.")
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"}:
        others = ", ".join(sorted(kinds - {"full_attention"}))
        reasons.append(f"layers of another kind ({others}); farspan plans for full attention in every layer only.")
    elif not kinds and window and getattr(config, "use_sliding_window", True):
        reasons.append(sliding_window_refusal(window))
    if not reasons:
        reasons += [each for each in [head_size_refusal(head_dim_of(config))] if each]
    if reasons:
        raise UnsupportedModelError(f"{name} has {' '.join(reasons)}")


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def dtype_of(config: Any) -> str:
    """What vLLM computes in with --dtype auto: checkpoints in float32 are served in 16 bits."""
    name = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "bfloat16")
    name = name.removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "bfloat16"


def quantized_bits(quantization: Mapping[str, Any]) -> float | None:
    """Bits of a weight in the layers, scales included, or None where this does not know."""
    method = quantization.get("quant_method")
    if method in ("gptq", "awq", "auto-round"):
        return quantization.get("bits", 4) + SCALE_BITS
    if method in ("fp8", "fbgemm_fp8"):
        return 8.0
    if method == "mxfp4":
        return 4 + SCALE_BITS
    if method == "bitsandbytes":
        return 4 + SCALE_BITS if quantization.get("load_in_4bit") else 8.0
    if method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        bits = max(((group.get("weights") or {}).get("num_bits") or 0 for group in groups.values()), default=0)
        if bits:
            return bits if bits >= 8 else bits + SCALE_BITS
    return None


def shape_of(name: str, config: Any) -> ModelShape:
    """Count a model's parameters on torch's meta device, which holds no numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    for field in ("quantization_config", "tie_encoder_decoder"):
        if getattr(config, field, None) is not None:
            delattr(config, field)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except (ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UnsupportedModelError(
            f"{name}: transformers cannot build this model ({reason}). Check its config.json, or upgrade transformers."
        ) from error
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    is_tied = head is embedding
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(each.numel() for path, each in model.named_parameters() if ".experts." in path)
    outside = embedding.numel() + (0 if is_tied else head.numel())
    num_experts = first_of(config, "num_experts", "num_local_experts", "n_routed_experts") if experts else 0
    per_token = first_of(config, "num_experts_per_tok", "experts_per_token", "moe_topk") if experts else 0
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if experts:
        width = max(per_token * (getattr(config, "moe_intermediate_size", None) or width), 1)
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim_of(config),
        vocab_size=config.vocab_size,
        intermediate_size=width,
        embedding_params=embedding.numel(),
        head_params=head.numel(),
        is_tied=is_tied,
        linear_params=total - outside - experts,
        expert_params=experts,
        num_experts=num_experts,
        experts_per_token=per_token,
        max_positions=positions_of(config),
    )


def first_of(config: Any, *fields: str) -> int:
    """The first of several names for one number that a configuration has."""
    found = [getattr(config, field, None) for field in fields]
    return next(each for each in [*found, 1] if isinstance(each, int))


def positions_of(config: Any) -> int:
    """Tokens of the longest context that vLLM allows for a configuration."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    factor = scaling.get("factor") if kind in EXTRAPOLATING_ROPE else None
    return int(config.max_position_embeddings * (factor or 1))


def file_bytes_of(folder: Path) -> int | None:
    """Bytes of the tensors in a folder's .safetensors files, or None where it has none."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return sum(map(tensor_bytes, files)) or None


def tensor_bytes(file: Path) -> int:
    """Bytes of the tensors in a .safetensors file. Raises UnsupportedModelError where it is none."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        return sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        )
    except (struct.error, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise UnsupportedModelError(f"{file} is no .safetensors file. Download it again, or give --weights.") from error
