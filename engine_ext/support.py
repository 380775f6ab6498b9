"""What farspan can serve, and the sentence that refuses what it cannot.

Every function here returns or raises a sentence that names the value, what is supported, and what to do instead.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from farspan.engine_ext.config import FarspanConfig, parse_config
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError, UnsupportedModelError

OPTIONS_KEY = "farspan"
HEAD_SIZES = (64, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
PREFERRED_PAGE_SIZE = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KV_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Names of kv-cache dtypes besides "auto"; allowed where they equal the model's dtype."""

ELSEWHERE = "Leave out --attention-backend to let vLLM choose another backend for this model"


def config_of(vllm_config: Any) -> FarspanConfig:
    """The options of an engine. Raises ConfigError, also on a misspelt `farspan` key."""
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        return FarspanConfig()
    if OPTIONS_KEY not in additional:
        near = difflib.get_close_matches(OPTIONS_KEY, [str(key) for key in additional], n=1, cutoff=0.75)
        if near:
            raise ConfigError(
                f"additional_config has {near[0]!r} but no {OPTIONS_KEY!r}; the options of this backend go under "
                f"{OPTIONS_KEY!r}. Rename the key."
            )
    return parse_config(additional.get(OPTIONS_KEY))


def head_size_refusal(head_size: int) -> str | None:
    if head_size in HEAD_SIZES:
        return None
    return f"head_size={head_size}; farspan supports {listed(HEAD_SIZES)}. {ELSEWHERE}."


def dtype_refusal(dtype: torch.dtype) -> str | None:
    if dtype in DTYPES:
        return None
    return f"dtype={name_of(dtype)}; farspan supports {listed(name_of(each) for each in DTYPES)}. Set --dtype to one."


def kv_cache_dtype_refusal(kv_cache_dtype: str | None, dtype: torch.dtype) -> str | None:
    if kv_cache_dtype in (None, "auto") or KV_CACHE_DTYPES.get(kv_cache_dtype) == dtype:
        return None
    return (
        f"kv_cache_dtype={kv_cache_dtype!r}; farspan stores keys and values in the model's dtype ({name_of(dtype)}). "
        "Set --kv-cache-dtype auto."
    )


def layer_refusals(
    *,
    head_size: int,
    kv_cache_dtype: str,
    dtype: torch.dtype,
    alibi_slopes: Any = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    attn_type: str = "decoder",
    kv_sharing_target_layer_name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[str]:
    """Why one attention layer cannot be served, in the terms of vLLM's impl constructor; empty if it can."""
    reasons = [
        head_size_refusal(head_size),
        dtype_refusal(dtype),
        kv_cache_dtype_refusal(kv_cache_dtype, dtype),
    ]
    if alibi_slopes is not None:
        reasons.append(f"ALiBi position biases; farspan supports rotary and no positions. {ELSEWHERE}.")
    if sliding_window is not None:
        reasons.append(sliding_window_refusal(sliding_window))
    if logits_soft_cap:
        reasons.append(f"logits_soft_cap={logits_soft_cap}; farspan supports plain softmax only. {ELSEWHERE}.")
    if attn_type != "decoder":
        reasons.append(f"attention type {attn_type!r}; farspan supports causal decoder attention only. {ELSEWHERE}.")
    if kv_sharing_target_layer_name is not None:
        reasons.append(
            f"KV shared with layer {kv_sharing_target_layer_name!r}; farspan needs each layer's own KV. {ELSEWHERE}."
        )
    for name, value in (extra or {}).items():
        if value is not None:
            reasons.append(f"attention argument {name!r}; farspan supports none beyond the standard ones. {ELSEWHERE}.")
    return [reason for reason in reasons if reason is not None]


def sliding_window_refusal(sliding_window: int) -> str:
    return (
        f"sliding_window={sliding_window}; farspan supports full attention only. Set --disable-sliding-window (which "
        "limits the context to the window), or leave out --attention-backend."
    )


def check_engine(vllm_config: Any) -> FarspanConfig:
    """Refuse an engine that cannot work with farspan, before anything is loaded; returns its options.

    Raises ConfigError, UnsupportedModelError or UnsupportedEngineError.
    """
    config = config_of(vllm_config)
    if vllm_config.model_config is not None:
        check_model(vllm_config.model_config, vllm_config.cache_config)
        if config.string is not None and getattr(vllm_config.model_config, "uses_mrope", False):
            raise UnsupportedModelError(
                f"string: {vllm_config.model_config.model} has multimodal rotary positions (mrope), several for each "
                "token; string shifts one position. Leave out the option string."
            )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise UnsupportedEngineError(
                f"{name}={size}; farspan supports 1. Use --tensor-parallel-size to spread a model over GPUs."
            )
    if vllm_config.speculative_config is not None:
        method = vllm_config.speculative_config.method
        raise UnsupportedEngineError(
            f"speculative decoding ({method!r}); farspan decodes one token a step. Leave out --speculative-config."
        )
    if vllm_config.kv_transfer_config is not None and config.changes_kv:
        raise UnsupportedEngineError(
            "a KV connector together with sparse prefill or string; KV computed so must not reach requests that expect "
            "exact KV. Use prefill method 'dense' without string, or leave out --kv-transfer-config."
        )
    return config


def check_model(model_config: Any, cache_config: Any) -> None:
    """Refuse a model by its configuration. Raises UnsupportedModelError."""
    name = model_config.model
    kinds = {
        "use_mla": "multi-head latent attention (MLA)",
        "is_hybrid": "a hybrid of attention and state-space layers",
        "is_attention_free": "no attention",
        "is_encoder_decoder": "an encoder and a decoder",
    }
    for attribute, kind in kinds.items():
        if getattr(model_config, attribute, False):
            raise UnsupportedModelError(f"{name} has {kind}; farspan supports decoders with plain GQA. {ELSEWHERE}.")
    if model_config.runner_type != "generate":
        raise UnsupportedModelError(
            f"{name} runs as {model_config.runner_type!r}; farspan supports generation only. {ELSEWHERE}."
        )
    soft_cap = getattr(model_config.hf_text_config, "attn_logit_softcapping", None)
    reasons = layer_refusals(
        head_size=model_config.get_head_size(),
        kv_cache_dtype=cache_config.cache_dtype,
        dtype=model_config.dtype,
        sliding_window=model_config.get_sliding_window(),
        logits_soft_cap=soft_cap,
    )
    if reasons:
        raise UnsupportedModelError(f"{name}: " + " ".join(reasons))


def listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
