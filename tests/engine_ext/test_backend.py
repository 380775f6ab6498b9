"""What the backend supports, and the sentences with which it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext import string
from farspan.engine_ext.backend import FarspanBackend
from farspan.engine_ext.config import parse_config
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError, UnsupportedModelError
from farspan.engine_ext.launch import choose_dense_kernel
from farspan.engine_ext.support import (
    block_size_refusal,
    check_engine,
    config_of,
    layer_refusals,
    platform_refusal,
)
from farspan.vllm_compat import rotary
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

LAYER: dict[str, Any] = {"head_size": 128, "kv_cache_dtype": "auto", "dtype": torch.bfloat16}
SELECTED: dict[str, Any] = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": None,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "device_capability": None,
    "attn_type": "decoder",
}


def test_what_it_announces() -> None:
    assert FarspanBackend.get_name() in AttentionBackendEnum.__members__
    assert FarspanBackend.get_supported_kernel_block_sizes() == [16, 32, 64, 128]
    assert FarspanBackend.get_preferred_block_size(16) == 128
    assert FarspanBackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    assert not FarspanBackend.forward_includes_kv_cache_update
    assert FarspanBackend.validate_configuration(**SELECTED) == []
    assert FarspanBackend.validate_configuration(**{**SELECTED, "device_capability": DeviceCapability(8, 0)}) == []
    assert FarspanBackend.validate_configuration(**{**SELECTED, "dtype": torch.float32, "block_size": 256}) == []
    on_hopper = {"kv_cache_dtype": "fp8", "device_capability": DeviceCapability(9, 0)}
    assert FarspanBackend.validate_configuration(**{**SELECTED, **on_hopper}) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_size": 80}, "head_size=80; farspan supports 64, 96, 128, 256."),
        ({"dtype": torch.float64}, "dtype=float64; farspan supports float16, bfloat16, float32."),
        (
            {"kv_cache_dtype": "fp8", "device_capability": DeviceCapability(8, 6)},
            "kv_cache_dtype='fp8' on a GPU of compute capability 8.6; float8 needs 8.9 (Ada) and later.",
        ),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype='float16'; farspan stores"),
        ({"block_size": 24}, "block_size=24; farspan supports multiples of 16. Use --block-size 128."),
        (
            {"device_capability": DeviceCapability(7, 5)},
            "a GPU of compute capability 7.5; farspan supports 8.0 (Ampere) and later.",
        ),
        ({"use_mla": True}, "multi-head latent attention; farspan supports plain GQA."),
        ({"has_sink": True}, "attention sinks; farspan supports plain softmax only."),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
        ({"use_dcp": True}, "DCP not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_selection_is_refused(change: dict[str, Any], sentence: str) -> None:
    assert sentence in " ".join(FarspanBackend.validate_configuration(**{**SELECTED, **change}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"alibi_slopes": [0.1]}, "ALiBi position biases"),
        ({"sliding_window": 4096}, "sliding_window=4096; farspan supports full attention only."),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap=30.0"),
        ({"attn_type": "encoder"}, "attention type 'encoder'"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "KV shared with layer 'layers.0'"),
        ({"extra": {"sinks": torch.zeros(4)}}, "attention argument 'sinks'"),
        ({"head_size_v": 64}, "values of head size 64 with keys of 128; farspan supports equal sizes."),
    ],
    ids=["alibi", "window", "soft-cap", "encoder", "kv-sharing", "sinks", "value-size"],
)
def test_layer_is_refused(change: dict[str, Any], sentence: str) -> None:
    (reason,) = layer_refusals(**{**LAYER, **change})
    assert reason.startswith(sentence)
    assert reason.endswith(".")
    assert layer_refusals(**LAYER) == []


def test_block_sizes_are_those_of_vllm() -> None:
    for block_size in range(1, 300):
        assert (block_size_refusal(block_size) is None) == FarspanBackend.supports_block_size(block_size), block_size


def test_layers_with_chunked_local_attention_are_refused() -> None:
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend

    with pytest.raises(UnsupportedModelError, match="ChunkedLocalAttention_8192_FarspanBackend: a layer that reads"):
        create_chunked_local_attention_backend(FarspanBackend, 8192)


def test_caches_with_values_of_another_size_are_refused() -> None:
    spec: dict[str, Any] = {"block_size": 128, "num_kv_heads": 2, "head_size": 128, "dtype": torch.bfloat16}
    equal = FullAttentionSpec(**spec)
    assert FarspanBackend.customize_spec(equal) is equal
    with pytest.raises(UnsupportedModelError, match="values of head size 64 with keys of 128"):
        FarspanBackend.customize_spec(FullAttentionSpec(**spec, head_size_v=64))


def platform(kind: str, capability: tuple[int, int] | None = None) -> Any:
    return SimpleNamespace(
        device_name=kind,
        device_type=kind,
        is_cpu=lambda: kind == "cpu",
        is_cuda=lambda: kind == "cuda",
        get_device_capability=lambda: None if capability is None else DeviceCapability(*capability),
    )


@pytest.mark.parametrize(
    ("machine", "sentence"),
    [
        (platform("cpu"), None),
        (platform("cuda"), None),
        (platform("cuda", (8, 0)), None),
        (platform("cuda", (12, 0)), None),
        (platform("cuda", (7, 5)), "a GPU of compute capability 7.5; farspan supports 8.0 (Ampere) and later."),
        (platform("rocm", (9, 0)), "platform 'rocm'; farspan supports NVIDIA GPUs (CUDA) and CPUs."),
        (platform("xpu"), "platform 'xpu'; farspan supports NVIDIA GPUs (CUDA) and CPUs."),
    ],
    ids=["cpu", "cuda", "ampere", "blackwell", "turing", "rocm", "xpu"],
)
def test_platforms(machine: Any, sentence: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = platform_refusal(machine)
    assert (reason is None) if sentence is None else str(reason).startswith(sentence)
    if sentence is not None:
        monkeypatch.setattr("vllm.platforms._current_platform", machine)
        with pytest.raises(UnsupportedEngineError, match="farspan supports"):
            check_engine(engine())


def engine(options: Any = None, model: dict[str, Any] | None = None, **changes: Any) -> Any:
    """An engine's configuration, with the attributes that the checks read."""
    defaults: dict[str, Any] = {
        **dict.fromkeys(("is_hybrid", "use_mla", "is_attention_free", "is_encoder_decoder", "uses_mrope"), False),
        **{"model": "m", "runner_type": "generate", "dtype": torch.bfloat16, "hf_text_config": SimpleNamespace()},
        **{"hf_overrides": {}, "using_transformers_backend": lambda: False},
    }
    model_config = SimpleNamespace(
        **{**defaults, **(model or {})},
        get_head_size=lambda: 128,
        get_sliding_window=lambda: changes.pop("window", None),
    )
    parallel = SimpleNamespace(decode_context_parallel_size=changes.pop("dcp", 1), prefill_context_parallel_size=1)
    return SimpleNamespace(
        additional_config={} if options is None else {"farspan": options},
        model_config=model_config,
        cache_config=SimpleNamespace(block_size=None, cache_dtype=changes.pop("cache_dtype", "auto")),
        parallel_config=parallel,
        speculative_config=changes.pop("speculative", None),
        kv_transfer_config=changes.pop("connector", None),
    )


@pytest.mark.parametrize(
    ("vllm_config", "error", "sentence"),
    [
        (engine(model={"use_mla": True}), UnsupportedModelError, "m has multi-head latent attention"),
        (engine(model={"is_hybrid": True}), UnsupportedModelError, "m has a hybrid of attention"),
        (engine(model={"is_encoder_decoder": True}), UnsupportedModelError, "m has an encoder and a decoder"),
        (
            engine(cache_dtype="fp8_per_token_head"),
            UnsupportedModelError,
            "kv_cache_dtype='fp8_per_token_head'; farspan stores keys and values in the model's dtype (bfloat16), or "
            "as fp8 and fp8_e4m3 with one scale",
        ),
        (engine(cache_dtype="fp8_e5m2"), UnsupportedModelError, "kv_cache_dtype='fp8_e5m2'; farspan stores keys"),
        (
            engine({"offload": {"hot_heads": 1, "cold_decode": {"method": "select"}}}, cache_dtype="fp8"),
            UnsupportedEngineError,
            "kv_cache_dtype='fp8' together with offload.cold_decode.method='select'",
        ),
        (engine(dcp=2), UnsupportedEngineError, "decode_context_parallel_size=2; farspan supports 1"),
        (
            engine(speculative=SimpleNamespace(method="eagle")),
            UnsupportedEngineError,
            "speculative decoding ('eagle'); farspan supports drafts that need no attention of their own: ngram,",
        ),
        (
            engine({"offload": {"hot_heads": 1}}, speculative=SimpleNamespace(method="ngram")),
            UnsupportedEngineError,
            "speculative decoding ('ngram') together with offload",
        ),
        (
            engine({"string": {"shift": 512}}, connector=object()),
            UnsupportedEngineError,
            "a KV connector together with",
        ),
        (
            engine({"string": {}}, model={"uses_mrope": True}),
            UnsupportedModelError,
            "m has multimodal rotary positions",
        ),
        (engine({"string": {}}), ConfigError, "Give shift in tokens"),
        (engine(model={"uses_alibi": True}), UnsupportedModelError, "m has ALiBi position biases"),
        (engine(model={"attention_chunk_size": 8192}), UnsupportedModelError, "m has chunked local attention"),
        (
            engine(model={"hf_text_config": SimpleNamespace(v_head_dim=64)}),
            UnsupportedModelError,
            "m: values of head size 64 with keys of 128",
        ),
        (engine({"kernel": "fa3"}), ConfigError, "kernel='fa3'; on the CPU platform"),
        (engine({"kernel": "x"}), ConfigError, "kernel='x'"),
    ],
    ids=[
        "mla",
        "hybrid",
        "encoder",
        "fp8-per-token",
        "fp8-e5m2",
        "fp8-selective-offload",
        "dcp",
        "draft-model",
        "speculative-offload",
        "connector",
        "mrope",
        "shift-of-unknown-length",
        "alibi",
        "chunked-local",
        "value-size",
        "fa3-on-cpu",
        "option",
    ],
)
def test_engine_is_refused(
    vllm_config: Any, error: type[Exception], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(string, "_source", rotary)
    with pytest.raises(error) as caught:
        check_engine(vllm_config)
    assert sentence in str(caught.value)


def test_fa3_is_refused_by_the_dtype_before_any_gpu_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms._current_platform", platform("cuda", (9, 0)))
    with pytest.raises(ConfigError, match="kernel='fa3'; FlashAttention 3 supports float16 and bfloat16, not float32"):
        check_engine(engine({"kernel": "fa3"}, model={"dtype": torch.float32}))
    with pytest.raises(ConfigError, match="kernel='fa3'; with a KV cache in fp8, FlashAttention 3 would round queries"):
        check_engine(engine({"kernel": "fa3"}, cache_dtype="fp8"))
    assert not torch.cuda.is_initialized()


def test_engine_is_accepted() -> None:
    assert check_engine(engine({"kernel": "auto"})) == parse_config({"kernel": "auto"})
    assert check_engine(engine(connector=object())) == parse_config(None)
    assert check_engine(engine(cache_dtype="fp8")) == parse_config(None)
    for method in ("ngram", "ngram_gpu", "suffix"):
        assert check_engine(engine(speculative=SimpleNamespace(method=method))) == parse_config(None)


@pytest.mark.parametrize("key", ["farspam", "Farspan", "FARSPAN", "far_span", "farspan.method", "farspan_options"])
def test_misspelt_key_is_noticed(key: str) -> None:
    with pytest.raises(ConfigError, match=f"has '{key}' but no 'farspan'.*Rename the key"):
        config_of(SimpleNamespace(additional_config={"other_plugin": 1, key: {}}))


@pytest.mark.parametrize(
    "additional",
    [
        {"prefill": {"method": "flex"}},
        {"prefil": {"method": "flex"}},
        {"kernel": "triton"},
        {"string": {}},
        {"method": "flex", "gamma": 0.9},
        {"gamma": 0.9},
        {"preset": "fast"},
    ],
    ids=["prefill", "misspelt", "kernel", "string", "method", "gamma", "preset"],
)
def test_options_at_the_top_level_are_noticed(additional: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"at its top level and no 'farspan'.*Write \{\"farspan\": \{"):
        config_of(SimpleNamespace(additional_config=additional))


@pytest.mark.parametrize(
    "additional",
    [
        {"other_plugin": {}},
        {"gdn_prefill_backend": "triton"},
        {"kernel_config": {}, "window": 3, "method": "eagle", "preset": "speed", "profile": True},
        {"farspan": {}, "prefill": "another plugin's"},
    ],
    ids=["plugin", "vllm", "general-words", "beside-ours"],
)
def test_keys_of_others_are_theirs(additional: dict[str, Any]) -> None:
    assert config_of(SimpleNamespace(additional_config=additional)) == parse_config(None)


@pytest.mark.parametrize(
    "other",
    [
        {"Farspan": {}},
        {"farspan.gamma": 1},
        {"prefill": {"method": "flex"}},
        {"string": {}},
        {"offload": {}},
        {"star": {}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_options_besides_ours_are_noticed(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"besides 'farspan'; .* Move it there, or remove it\."):
        config_of(SimpleNamespace(additional_config={"farspan": {"prefill": {"method": "dense"}}, **other}))


@pytest.mark.parametrize("kernel", ["triton", "fa3"])
def test_kernels_of_the_gpu_are_refused_on_the_cpu(kernel: str) -> None:
    with pytest.raises(ConfigError, match=f"kernel='{kernel}'; on the CPU platform"):
        choose_dense_kernel(parse_config({"kernel": kernel}), torch.device("cpu"), 128, torch.bfloat16)
