"""Configurations become shapes: counted parameters, positions, quantization, and refusals that say why."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from farspan.engine_ext.errors import UnsupportedModelError
from farspan.model_shape import quantized_bits, read_model

from tools.capacity_example import CONFIG as LLAMA_8B

QWEN_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}


def folder(path: Path, config: dict[str, Any], **changes: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))
    return str(path)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_llama_8b(tmp_path: Path) -> None:
    info = read_model(folder(tmp_path, LLAMA_8B))
    shape = info.shape
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (32, 32, 8, 128)
    assert shape.stored_params == 8_030_261_248  # as published
    assert (shape.max_positions, info.dtype, info.layer_bits) == (131072, "bfloat16", 16)
    assert not shape.is_tied
    assert info.file_bytes is None


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    shape = read_model(folder(tmp_path, QWEN_05B)).shape
    assert shape.is_tied
    assert shape.stored_params == 494_032_768  # as published
    assert shape.head_params == shape.embedding_params == 151936 * 896


def test_routed_experts_are_told_from_what_every_token_meets(tmp_path: Path) -> None:
    shape = read_model(folder(tmp_path, MIXTRAL)).shape
    assert shape.stored_params == 46_702_792_704  # as published
    assert shape.expert_params == 32 * 8 * 3 * 4096 * 14336
    assert (shape.num_experts, shape.experts_per_token, shape.intermediate_size) == (8, 2, 2 * 14336)
    # Mixtral activates 12.9 billion parameters, embeddings and head included.
    assert shape.active_params + 2 * 32000 * 4096 == pytest.approx(12.9e9, rel=0.01)


def test_shared_experts_belong_to_every_token(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2_moe",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 512,
    }
    shape = read_model(folder(tmp_path, config)).shape
    assert shape.expert_params == 2 * 4 * 3 * 256 * 96
    assert shape.linear_params > 2 * 3 * 256 * 512


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 4 * 131072),
        ({"rope_type": "dynamic", "factor": 2.0}, 2 * 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
        ),
        (None, 131072),
    ],
    ids=["linear", "dynamic", "yarn", "llama3", "none"],
)
def test_positions_are_those_that_vllm_allows(tmp_path: Path, rope: Any, positions: int) -> None:
    name = folder(tmp_path, LLAMA_8B, rope_scaling=rope, rope_theta=500000.0)
    assert read_model(name).shape.max_positions == positions


def test_overrides_change_the_configuration(tmp_path: Path) -> None:
    name = folder(tmp_path, LLAMA_8B)
    assert read_model(name, overrides={"max_position_embeddings": 2**20}).shape.max_positions == 2**20


@pytest.mark.parametrize(
    ("stored", "asked", "used"),
    [("float32", "auto", "bfloat16"), ("float16", "auto", "float16"), ("float16", "float32", "float32")],
)
def test_dtype(tmp_path: Path, stored: str, asked: str, used: str) -> None:
    info = read_model(folder(tmp_path, QWEN_05B, torch_dtype=..., dtype=stored), asked)
    assert info.dtype == used
    assert info.layer_bits == (32 if used == "float32" else 16)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4.25),
        ({"quant_method": "gptq", "bits": 8}, 8.25),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.25),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 4.25),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
        ({"quant_method": "compressed-tensors"}, None),
        ({"quant_method": "something"}, None),
    ],
    ids=str,
)
def test_bits_of_quantized_weights(quantization: dict[str, Any], bits: float | None) -> None:
    assert quantized_bits(quantization) == bits


def test_quantized_model_keeps_its_shape(tmp_path: Path) -> None:
    info = read_model(folder(tmp_path, LLAMA_8B, quantization_config={"quant_method": "awq", "bits": 4}))
    assert (info.layer_bits, info.quantization, info.shape.stored_params) == (4.25, "awq", 8_030_261_248)


def test_files_tell_the_weights(tmp_path: Path) -> None:
    name = folder(tmp_path, QWEN_05B)
    header = json.dumps({"a": {"dtype": "F16", "shape": [3], "data_offsets": [0, 6]}, "__metadata__": {"x": "y"}})
    for file in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / file).write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(6))
    assert read_model(name).file_bytes == 12
    (tmp_path / "model-3.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(UnsupportedModelError, match=r"model-3\.safetensors is no \.safetensors file"):
        read_model(name)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "no_such_model"}, "no configuration that transformers can read"),
        ({"model_type": "mistral", "sliding_window": 4096}, r"sliding_window=4096; farspan supports full attention"),
        ({"head_dim": 80}, "head_size=80; farspan supports 64, 96, 128, 256"),
        (
            {"model_type": "gemma2", "head_dim": 256},
            r"layers of another kind \(sliding_attention\)",
        ),
        ({"model_type": "deepseek_v3", "num_key_value_heads": 32}, r"multi-head latent attention"),
        ({"model_type": "mamba", "num_attention_heads": ...}, "no num_attention_heads in its configuration"),
        ({"model_type": "t5"}, "an encoder and a decoder"),
    ],
    ids=["unknown", "sliding", "head-size", "mixed", "mla", "mamba", "t5"],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        read_model(folder(tmp_path, LLAMA_8B, **changes))


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is a folder without config\.json"):
        read_model(str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"nobody/nothing: no configuration .*name on the model hub"):
        read_model("nobody/nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="no configuration that transformers can read"):
        read_model(str(tmp_path))
