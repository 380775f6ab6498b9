"""What farspan can serve, and the sentence that refuses what it cannot.

Every function here returns or raises a sentence that names the value, what is supported, and what to do instead.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from farspan.engine_ext.config import (
    PREFILL_METHODS,
    BlockSparsePrefill,
    FarspanConfig,
    FlexPrefill,
    SelectColdDecode,
    decode_once,
)
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError, UnsupportedModelError
from farspan.engine_ext.presets import PRESETS
from farspan.engine_ext.string import check_string, rotary_source

OPTIONS_KEY = "farspan"
HEAD_SIZES = (64, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
PREFERRED_PAGE_SIZE = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KV_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Names of kv-cache dtypes besides "auto" and fp8; allowed where they equal the model's dtype."""
FP8_KV_CACHE_DTYPES = ("fp8", "fp8_e4m3")
"""Names of float8_e4m3fn with one scale a tensor."""
FP8_CAPABILITY = (8, 9)
"""CUDA compute capability of Ada, the first that converts float8."""
SPECULATIVE_METHODS = ("ngram", "ngram_gpu", "suffix")
"""Whose drafts come from the tokens alone: no model's layers run between the steps that verify them."""
MIN_CAPABILITY = (8, 0)
"""CUDA compute capability of Ampere, the first with bfloat16 and asynchronous copies."""

ELSEWHERE = "Leave out --attention-backend to let vLLM choose another backend for this model"


def config_of(vllm_config: Any) -> FarspanConfig:
    """The options of an engine. Raises ConfigError, also where they are not under the key `farspan`."""
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping):
        return FarspanConfig()
    if OPTIONS_KEY in additional:
        check_keys_besides(additional)
    else:
        check_no_options_elsewhere(additional)
    return decode_once(additional.get(OPTIONS_KEY))


def check_keys_besides(additional: Mapping[str, Any]) -> None:
    """Refuse keys besides `farspan` in an additional_config that can only be meant for us. Raises ConfigError."""
    for key in map(str, additional):
        is_option = key in FarspanConfig.__struct_fields__ and isinstance(additional[key], Mapping)
        if key != OPTIONS_KEY and (is_option or key.lower().startswith(OPTIONS_KEY)):
            raise ConfigError(
                f"additional_config has {key!r} besides {OPTIONS_KEY!r}; the options of this backend go under "
                f"{OPTIONS_KEY!r} alone. Move it there, or remove it."
            )


def check_no_options_elsewhere(additional: Mapping[str, Any]) -> None:
    """Refuse an additional_config whose keys show that our options were meant; those of other plugins are theirs.

    Raises ConfigError.
    """
    for key in map(str, additional):
        if key.lower().startswith(OPTIONS_KEY) or is_near(key.lower(), [OPTIONS_KEY], cutoff=0.75):
            raise ConfigError(
                f"additional_config has {key!r} but no {OPTIONS_KEY!r}; the options of this backend go under "
                f"{OPTIONS_KEY!r}. Rename the key."
            )
        sections = [name for name in FarspanConfig.__struct_fields__ if name != "preset"]
        is_option = is_near(key, sections, cutoff=0.85) or key in FlexPrefill.__struct_fields__
        # Names that other plugins may well use; their values tell.
        named: Iterable[str] = {"method": tuple(PREFILL_METHODS), "preset": tuple(PRESETS)}.get(key, ())
        if is_option or str(additional[key]) in named:
            raise ConfigError(
                f"additional_config has {key!r} at its top level and no {OPTIONS_KEY!r}; the options of this backend "
                f'go under {OPTIONS_KEY!r}. Write {{"{OPTIONS_KEY}": {{"prefill": {{"method": "flex"}}}}}}.'
            )


def is_near(name: str, known: Iterable[str], *, cutoff: float) -> bool:
    """Whether a name is a known one, or may well be one misspelt."""
    return bool(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff))


def platform_refusal(platform: Any) -> str | None:
    """Why a platform of vLLM's cannot be served, or None if it can; does not initialise CUDA."""
    if platform.is_cpu():
        return None
    if not platform.is_cuda():
        return f"platform {platform.device_name!r}; farspan supports NVIDIA GPUs (CUDA) and CPUs. {ELSEWHERE}."
    return capability_refusal(platform.get_device_capability())


def capability_refusal(capability: tuple[int, int] | None) -> str | None:
    """Why a GPU cannot be served. capability: major and minor; None where there is no GPU, or none is known."""
    if capability is None or tuple(capability) >= MIN_CAPABILITY:
        return None
    given, least = (".".join(map(str, each)) for each in (capability, MIN_CAPABILITY))
    return f"a GPU of compute capability {given}; farspan supports {least} (Ampere) and later. {ELSEWHERE}."


def head_size_refusal(head_size: int, head_size_v: int | None = None) -> str | None:
    """head_size_v: of the values, where it is known to differ."""
    if head_size_v not in (None, head_size):
        return f"values of head size {head_size_v} with keys of {head_size}; farspan supports equal sizes. {ELSEWHERE}."
    if head_size in HEAD_SIZES:
        return None
    return f"head_size={head_size}; farspan supports {listed(HEAD_SIZES)}. {ELSEWHERE}."


def dtype_refusal(dtype: torch.dtype) -> str | None:
    if dtype in DTYPES:
        return None
    return f"dtype={name_of(dtype)}; farspan supports {listed(name_of(each) for each in DTYPES)}. Set --dtype to one."


def block_size_refusal(block_size: int | None) -> str | None:
    """block_size: tokens of a page, None where the user left it open; several of our pages may make one of vLLM's."""
    if block_size is None or block_size % min(PAGE_SIZES) == 0:
        return None
    return (
        f"block_size={block_size}; farspan supports multiples of {min(PAGE_SIZES)}. Use --block-size "
        f"{PREFERRED_PAGE_SIZE}."
    )


def kv_cache_dtype_refusal(
    kv_cache_dtype: str | None, dtype: torch.dtype, capability: tuple[int, int] | None = None
) -> str | None:
    """capability: of the GPU, major and minor; None where there is no GPU, or none is known."""
    if kv_cache_dtype in (None, "auto") or KV_CACHE_DTYPES.get(kv_cache_dtype) == dtype:
        return None
    if kv_cache_dtype in FP8_KV_CACHE_DTYPES:
        if capability is None or tuple(capability) >= FP8_CAPABILITY:
            return None
        given, least = (".".join(map(str, each)) for each in (capability, FP8_CAPABILITY))
        return (
            f"kv_cache_dtype={kv_cache_dtype!r} on a GPU of compute capability {given}; float8 needs {least} (Ada) and "
            "later. Set --kv-cache-dtype auto."
        )
    return (
        f"kv_cache_dtype={kv_cache_dtype!r}; farspan stores keys and values in the model's dtype ({name_of(dtype)}), "
        f"or as {' and '.join(FP8_KV_CACHE_DTYPES)} with one scale for the keys of a layer and one for its values. Set "
        "--kv-cache-dtype auto or fp8."
    )


def stored_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """Of the numbers in a KV cache that is not refused; dtype: of the model."""
    return torch.float8_e4m3fn if kv_cache_dtype in FP8_KV_CACHE_DTYPES else dtype


def check_fp8(kv_cache_dtype: str, vllm_config: Any) -> None:
    """Refuse what a float8 cache does not work with. Raises UnsupportedEngineError."""
    from vllm.platforms import current_platform

    if kv_cache_dtype not in FP8_KV_CACHE_DTYPES:
        return
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    reason = kv_cache_dtype_refusal(kv_cache_dtype, torch.float32, capability)
    if reason is not None:
        raise UnsupportedEngineError(reason)
    config, named = config_of(vllm_config), f"kv_cache_dtype={kv_cache_dtype!r}"
    if config.star is not None:
        raise UnsupportedEngineError(
            f"{named} together with star, which sends keys and values to other hosts in the model's dtype. Set "
            "--kv-cache-dtype auto, or leave out star."
        )
    if config.offload is not None and isinstance(config.offload.cold_decode, SelectColdDecode):
        raise UnsupportedEngineError(
            f"{named} together with offload.cold_decode.method='select', whose bounds of pages are of keys in the "
            'model\'s dtype. Set --kv-cache-dtype auto, or offload.cold_decode.method to "exact".'
        )
    if getattr(vllm_config.cache_config, "kv_cache_dtype_skip_layers", None):
        raise UnsupportedEngineError(
            f"{named} with kv_cache_dtype_skip_layers; farspan stores all layers alike. Leave them out."
        )
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedEngineError(
            f"{named} with calculate_kv_scales, which changes scales while CUDA graphs hold the old ones; farspan "
            "reads those of the checkpoint. Leave out --calculate-kv-scales."
        )


def layer_refusals(
    *,
    head_size: int,
    kv_cache_dtype: str,
    dtype: torch.dtype,
    head_size_v: int | None = None,
    alibi_slopes: Any = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    attn_type: str = "decoder",
    kv_sharing_target_layer_name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[str]:
    """Why one attention layer cannot be served, in the terms of vLLM's impl constructor; empty if it can."""
    reasons = [
        head_size_refusal(head_size, head_size_v),
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


def has_window_layers(model_config: Any) -> bool:
    """Whether some layers see a window of the last tokens and others all: vLLM's own backend then serves the first."""
    kinds = getattr(model_config.hf_text_config, "layer_types", None) or ()
    return {"sliding_attention", "full_attention"} <= set(kinds) and not model_config.disable_sliding_window


def check_engine(vllm_config: Any) -> FarspanConfig:
    """Refuse an engine that cannot work with farspan, before anything is loaded; returns its options.

    Runs in the front end, so that its sentence reaches the user. What only a loaded model shows, its layers refuse.
    Raises ConfigError, UnsupportedModelError or UnsupportedEngineError.
    """
    from vllm.platforms import current_platform

    config = config_of(vllm_config)
    reason = platform_refusal(current_platform)
    if reason is not None:
        raise UnsupportedEngineError(reason)
    if vllm_config.model_config is not None:
        check_model(vllm_config.model_config, vllm_config.cache_config)
        cache_dtype = vllm_config.cache_config.cache_dtype
        check_fp8(cache_dtype, vllm_config)
        check_options(config, vllm_config.model_config, current_platform.device_type, cache_dtype)
        check_window_layers(config, vllm_config)
    check_features(config, vllm_config)
    check_offload(vllm_config)
    return config


def check_window_layers(config: FarspanConfig, vllm_config: Any) -> None:
    """Refuse what must reach every layer, where some have another backend. Raises UnsupportedModelError."""
    model_config = vllm_config.model_config
    if not has_window_layers(model_config):
        return
    chosen = {name: name for name in ("string", "offload", "star") if getattr(config, name) is not None}
    if vllm_config.speculative_config is not None:
        # Which requests of a step decode goes by their order, in which another backend has a say.
        chosen["speculative decoding"] = "--speculative-config"
    if vllm_config.cache_config.cache_dtype in FP8_KV_CACHE_DTYPES:
        # Not every backend of vLLM has it on every GPU.
        chosen["an fp8 KV cache"] = "--kv-cache-dtype"
    for name, given in chosen.items():
        raise UnsupportedModelError(
            f"{model_config.model} has layers with a sliding window, which vLLM's own backend serves; {name} has "
            f"to reach all layers. Leave out {given}."
        )


def check_options(config: FarspanConfig, model_config: Any, device_type: str, cache_dtype: str = "auto") -> None:
    """Refuse options that the model, a file or the device rules out. Raises ConfigError or UnsupportedModelError."""
    from farspan.engine_ext.launch import choose_dense_kernel

    dtype = stored_dtype(cache_dtype, model_config.dtype)
    choose_dense_kernel(config, torch.device(device_type), model_config.get_head_size(), dtype)
    if config.string is not None:
        check_string(model_config, config.string)
    if config.star is not None:
        rotary_source().check_rotary(model_config, "star")
    if isinstance(config.prefill, BlockSparsePrefill) and config.prefill.mask_file is not None:
        check_mask_file(config.prefill.mask_file, config.prefill.block_size, model_config)


def check_mask_file(file: str, block_size: int, model_config: Any) -> None:
    """Raise ConfigError unless a mask file can be read and fits the model."""
    from farspan.engine_ext.selection.masks import check_mask, load_mask

    check_mask(
        load_mask(file),
        model_config.get_total_num_hidden_layers(),
        model_config.model_arch_config.total_num_attention_heads,
        model_config.get_total_num_kv_heads(),
        model_config.max_model_len,
        block_size,
        file,
    )


def check_features(config: FarspanConfig, vllm_config: Any) -> None:
    """Refuse features of vLLM that farspan cannot work with. Raises UnsupportedEngineError."""
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise UnsupportedEngineError(
                f"{name}={size}; farspan supports 1. Use --tensor-parallel-size to spread a model over GPUs."
            )
    if config.star is not None:
        size = parallel.pipeline_parallel_size
        if size > 1:
            raise UnsupportedEngineError(
                f"star in an engine of {size} pipeline stages; a host's layers are all on each of its "
                "GPUs. Use tensor_parallel_size, or give StarLLM more hosts."
            )
        if has_kv_connector(vllm_config):
            raise UnsupportedEngineError(
                "star together with a KV connector, which cannot tell a block's KV from exact KV. Leave out "
                "--kv-transfer-config and --kv-offloading-size."
            )
    if vllm_config.speculative_config is not None:
        reason = speculation_refusal(vllm_config.speculative_config.method, config)
        if reason is not None:
            raise UnsupportedEngineError(reason)
    if has_kv_connector(vllm_config) and config.changes_kv:
        raise UnsupportedEngineError(
            "a KV connector together with sparse prefill or string; KV computed so must not reach requests that expect "
            "exact KV. Use prefill method 'dense' without string, or leave out --kv-transfer-config and "
            "--kv-offloading-size."
        )


def max_decode_len(vllm_config: Any) -> int:
    """The most query tokens of a request that decodes: one, and those of its drafts."""
    speculative_config = vllm_config.speculative_config
    return 1 if speculative_config is None else 1 + int(speculative_config.num_speculative_tokens)


def speculation_refusal(method: str, config: FarspanConfig) -> str | None:
    """Why drafts of a method of vLLM's cannot be verified, or None if they can."""
    if method not in SPECULATIVE_METHODS:
        return (
            f"speculative decoding ({method!r}); farspan supports drafts that need no attention of their own: "
            f"{listed(SPECULATIVE_METHODS)}. Use one of these methods, or leave out --speculative-config."
        )
    if config.star is not None:
        return (
            f"speculative decoding ({method!r}) together with star; the hosts decode one token a step together. Leave "
            "out --speculative-config."
        )
    if config.offload is not None:
        return (
            f"speculative decoding ({method!r}) together with offload; a page in host memory is never written again, "
            "as rejected drafts would have to be. Leave out --speculative-config, or offload."
        )
    return None


def has_kv_connector(vllm_config: Any) -> bool:
    """Whether an engine has a KV connector, or gets one: vLLM makes that of --kv-offloading-size after its checks."""
    return (
        vllm_config.kv_transfer_config is not None
        or getattr(vllm_config.cache_config, "kv_offloading_size", None) is not None
    )


def hot_heads(vllm_config: Any) -> tuple[int, ...]:
    """Hot KV heads of every layer on each rank, for an engine with the option `offload`. Raises ConfigError."""
    options, model_config = config_of(vllm_config).offload, vllm_config.model_config
    assert options is not None
    return options.hot_heads_per_layer(
        model_config.get_total_num_hidden_layers(),
        model_config.get_total_num_kv_heads(),
        vllm_config.parallel_config.tensor_parallel_size,
    )


def has_cold_heads(vllm_config: Any) -> bool:
    """Whether any KV head of any layer is cold. Raises ConfigError."""
    if config_of(vllm_config).offload is None or vllm_config.model_config is None:
        return False
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    per_rank = max(vllm_config.model_config.get_total_num_kv_heads() // num_ranks, 1)
    return min(hot_heads(vllm_config)) < per_rank


def check_offload(vllm_config: Any) -> None:
    """Refuse what sees the pages of hot heads alone. Raises UnsupportedEngineError or ConfigError."""
    if not has_cold_heads(vllm_config):
        return
    parallel, block_size = vllm_config.parallel_config, vllm_config.cache_config.block_size
    reasons = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1 and "Use --tensor-parallel-size.",
        "a KV connector": has_kv_connector(vllm_config) and "Leave out --kv-transfer-config and --kv-offloading-size.",
        "sleep mode": vllm_config.model_config.enable_sleep_mode and "Leave out --enable-sleep-mode.",
        "microbatches": parallel.use_ubatching and "Leave out --enable-dbo.",
        f"block_size={block_size}": block_size not in (None, *PAGE_SIZES) and f"Use one of {listed(PAGE_SIZES)}.",
    }
    for feature, remedy in reasons.items():
        if remedy:
            raise UnsupportedEngineError(
                f"{feature} together with offload; cold KV heads are in no page that it sees. {remedy}"
            )


def check_model(model_config: Any, cache_config: Any) -> None:
    """Refuse a model by its configuration, and its cache. Raises UnsupportedModelError or UnsupportedEngineError."""
    name = model_config.model
    kinds = {
        "use_mla": "multi-head latent attention (MLA)",
        "is_hybrid": "a hybrid of attention and state-space layers",
        "is_attention_free": "no attention",
        "is_encoder_decoder": "an encoder and a decoder",
        "uses_alibi": "ALiBi position biases",
        "attention_chunk_size": "chunked local attention",
    }
    for attribute, kind in kinds.items():
        if getattr(model_config, attribute, False):
            raise UnsupportedModelError(f"{name} has {kind}; farspan supports decoders with plain GQA. {ELSEWHERE}.")
    if model_config.runner_type != "generate":
        raise UnsupportedModelError(
            f"{name} runs as {model_config.runner_type!r}; farspan supports generation only. {ELSEWHERE}."
        )
    text_config = model_config.hf_text_config
    reasons = layer_refusals(
        head_size=model_config.get_head_size(),
        head_size_v=getattr(text_config, "v_head_dim", None),
        kv_cache_dtype=cache_config.cache_dtype,
        dtype=model_config.dtype,
        sliding_window=None if has_window_layers(model_config) else model_config.get_sliding_window(),
        logits_soft_cap=getattr(text_config, "attn_logit_softcapping", None),
    )
    block_size = block_size_refusal(cache_config.block_size)
    if block_size is not None:
        raise UnsupportedEngineError(block_size)
    if reasons:
        raise UnsupportedModelError(f"{name}: " + " ".join(reasons))


def listed(values: Any) -> str:
    return ", ".join(str(value) for value in values)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
