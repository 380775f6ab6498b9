"""What the backend announces, and the sentences with which it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext.backend import FarspanBackend
from farspan.engine_ext.config import parse_config
from farspan.engine_ext.dispatch import choose_dense_kernel
from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError, UnsupportedModelError
from farspan.engine_ext.support import check_engine, config_of, layer_refusals
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

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
    assert FarspanBackend.validate_configuration(**{**SELECTED, "dtype": torch.float32, "block_size": 256}) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_size": 80}, "head_size=80; farspan supports 64, 96, 128, 256."),
        ({"dtype": torch.float64}, "dtype=float64; farspan supports float16, bfloat16, float32."),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'; farspan stores keys and values in the model's dtype"),
        ({"kv_cache_dtype": "float16"}, "kv_cache_dtype='float16'; farspan stores"),
        ({"block_size": 24}, "block_size=24; farspan supports multiples of 16, 32, 64, 128."),
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
    ],
    ids=["alibi", "window", "soft-cap", "encoder", "kv-sharing", "sinks"],
)
def test_layer_is_refused(change: dict[str, Any], sentence: str) -> None:
    (reason,) = layer_refusals(**{**LAYER, **change})
    assert reason.startswith(sentence)
    assert reason.endswith(".")
    assert layer_refusals(**LAYER) == []


def engine(options: Any = None, model: dict[str, Any] | None = None, **changes: Any) -> Any:
    """An engine's configuration, as far as it is looked at."""
    defaults = {"is_hybrid": False, "use_mla": False, "is_attention_free": False, "is_encoder_decoder": False}
    model_config = SimpleNamespace(
        **{"model": "m", "runner_type": "generate", "dtype": torch.bfloat16, "hf_text_config": SimpleNamespace()},
        **{**defaults, **(model or {})},
        get_head_size=lambda: 128,
        get_sliding_window=lambda: changes.pop("window", None),
    )
    parallel = SimpleNamespace(decode_context_parallel_size=changes.pop("dcp", 1), prefill_context_parallel_size=1)
    return SimpleNamespace(
        additional_config={} if options is None else {"farspan": options},
        model_config=model_config,
        cache_config=SimpleNamespace(cache_dtype=changes.pop("cache_dtype", "auto")),
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
        (engine(cache_dtype="fp8"), UnsupportedModelError, "kv_cache_dtype='fp8'"),
        (engine(dcp=2), UnsupportedEngineError, "decode_context_parallel_size=2; farspan supports 1"),
        (engine(speculative=SimpleNamespace(method="ngram")), UnsupportedEngineError, "speculative decoding"),
        (engine({"string": {}}, connector=object()), UnsupportedEngineError, "a KV connector together with"),
        (
            engine({"string": {}}, model={"uses_mrope": True}),
            UnsupportedModelError,
            "m has multimodal rotary positions",
        ),
        (engine({"kernel": "x"}), ConfigError, "kernel='x'"),
    ],
    ids=["mla", "hybrid", "encoder", "fp8", "dcp", "speculative", "connector", "mrope", "option"],
)
def test_engine_is_refused(vllm_config: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        check_engine(vllm_config)
    assert sentence in str(caught.value)


def test_engine_is_accepted() -> None:
    assert check_engine(engine({"kernel": "auto"})) == parse_config({"kernel": "auto"})
    assert check_engine(engine(connector=object())) == parse_config(None)


def test_misspelt_key_is_noticed() -> None:
    with pytest.raises(ConfigError, match="has 'farspam' but no 'farspan'"):
        config_of(SimpleNamespace(additional_config={"farspam": {}}))
    assert config_of(SimpleNamespace(additional_config={"other_plugin": {}})) == parse_config(None)


@pytest.mark.parametrize("kernel", ["triton", "fa3"])
def test_kernels_of_the_gpu_are_refused_on_the_cpu(kernel: str) -> None:
    with pytest.raises(ConfigError, match=f"kernel='{kernel}'; on the CPU platform"):
        choose_dense_kernel(parse_config({"kernel": kernel}), torch.device("cpu"), 128, torch.bfloat16)
