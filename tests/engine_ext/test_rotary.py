"""The frequencies taken from vLLM's rotary modules, against the rotations that the modules themselves do."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext.config import StringOptions
from farspan.engine_ext.errors import ConfigError, UnsupportedModelError
from farspan.engine_ext.string import (
    find_rotary_emb,
    inverse_frequencies,
    shift_tokens,
    string_shift_for_layer,
)
from farspan.kernels.rotary_turn import apply_shift, make_rotary_shift
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

HEAD_DIM = 64
MAX_POSITION = 4096
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500000.0},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "ntk-mixed": {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.625},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "max_trained_positions": 1024},
    "dynamic-alpha": {"rope_type": "dynamic", "alpha": 1000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-attention-factor": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256, "attention_factor": 1.7,
    },
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 1024, "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [1.0 + index for index in range(HEAD_DIM // 2)],
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def engine_config() -> Iterator[SimpleNamespace]:
    """Rotary modules read the engine's configuration when they are made."""
    config = VllmConfig()
    # LongRoPE asks for the length that the engine runs at.
    object.__setattr__(config, "model_config", SimpleNamespace(max_model_len=MAX_POSITION))
    with set_current_vllm_config(config):
        yield config


def make_rotary(name: str, dtype: torch.dtype, is_neox: bool = True) -> torch.nn.Module:
    return get_rope(HEAD_DIM, MAX_POSITION, is_neox, dict(SCALINGS[name]), dtype)


def rotate(rotary_emb: torch.nn.Module, position: int, query: torch.Tensor) -> torch.Tensor:
    positions = torch.full((len(query),), position)
    forward = getattr(rotary_emb, "forward_native", rotary_emb.forward)
    return forward(positions, query.flatten(1).clone(), query.flatten(1).clone())[0].view_as(query)


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("name", SCALINGS)
def test_shift_is_the_difference_of_two_rotations(name: str, is_neox: bool) -> None:
    if name == "longrope" and not is_neox:
        pytest.skip("until vLLM's LongRoPE has more than the neox style")
    rotary_emb = make_rotary(name, torch.float32, is_neox)
    query = torch.randn(5, 3, HEAD_DIM)
    shift, window, position = 700, 30, 2500
    string = make_rotary_shift(inverse_frequencies(rotary_emb), shift, window, is_neox, torch.device("cpu"))
    shifted = apply_shift(rotate(rotary_emb, position, query), string)
    # The module's own angles are float32: at 2500 radians they are good to 2500 * 6e-8.
    torch.testing.assert_close(shifted, rotate(rotary_emb, position - shift + window, query), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_low_precision_modules_give_the_same_frequencies(name: str) -> None:
    expected = inverse_frequencies(make_rotary(name, torch.float32))
    assert expected.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(inverse_frequencies(make_rotary(name, dtype)), expected)


def attention_parent(rotary_emb: torch.nn.Module | None, layer_name: str, **attributes: Any) -> torch.nn.Module:
    parent = torch.nn.Module()
    parent.attn = torch.nn.Module()
    parent.attn.layer_name = layer_name
    if rotary_emb is not None:
        parent.rotary_emb = rotary_emb
    for name, value in attributes.items():
        setattr(parent, name, value)
    return parent


def test_finds_the_rotary_module_beside_the_layer() -> None:
    shared, other = make_rotary("default", torch.float32), make_rotary("yarn", torch.float32)
    model = torch.nn.ModuleList(
        [attention_parent(shared, "a.attn"), attention_parent(shared, "b.attn"), attention_parent(other, "c.attn")]
    )
    assert find_rotary_emb(model, "a.attn") is shared
    assert find_rotary_emb(model, "b.attn") is shared
    assert find_rotary_emb(model, "c.attn") is other


@pytest.mark.parametrize("case", ["none", "two", "nope", "use_rope", "elsewhere"])
def test_refuses_a_layer_without_one_rotary_module(case: str) -> None:
    rotary_emb = make_rotary("default", torch.float32)
    parents = {
        "none": attention_parent(None, "x.attn"),
        "two": attention_parent(rotary_emb, "x.attn", rotary_local=make_rotary("linear", torch.float32)),
        "nope": attention_parent(rotary_emb, "x.attn", nope=True),
        "use_rope": attention_parent(rotary_emb, "x.attn", use_rope=False),
        "elsewhere": attention_parent(rotary_emb, "y.attn"),
    }
    with pytest.raises(UnsupportedModelError, match=r"x\.attn.*Leave out the option string"):
        find_rotary_emb(torch.nn.ModuleList([parents[case]]), "x.attn")


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "mrope_section": [8, 12, 12]},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mrope_section": [8, 12, 12]},
    ],
    ids=["mrope", "mrope-yarn"],
)
def test_refuses_multimodal_positions(parameters: dict[str, Any]) -> None:
    rotary_emb = get_rope(HEAD_DIM, MAX_POSITION, True, parameters, torch.float32)
    with pytest.raises(UnsupportedModelError, match="MRotaryEmbedding"):
        inverse_frequencies(rotary_emb)


def test_refuses_a_module_whose_cosines_are_others() -> None:
    rotary_emb = make_rotary("default", torch.float32)
    changed = type(rotary_emb)(HEAD_DIM, HEAD_DIM, 128, 10000.0, True, torch.float32)
    changed.base = 20000.0
    with pytest.raises(UnsupportedModelError, match="constant frequency"):
        inverse_frequencies(changed)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("default", StringOptions(shift=0.25), MAX_POSITION // 4),
        ("llama3", StringOptions(shift=0.25), MAX_POSITION // 4),
        ("yarn", StringOptions(shift=0.25), 256),
        ("dynamic", StringOptions(shift=0.25), 256),
        ("yarn", StringOptions(shift=3000), 3000),
    ],
)
def test_fraction_of_the_trained_length(name: str, options: StringOptions, expected: int) -> None:
    hf_text_config = SimpleNamespace(max_position_embeddings=MAX_POSITION)
    assert shift_tokens(options, make_rotary(name, torch.float32), hf_text_config) == expected


def test_refuses_a_fraction_that_means_nothing() -> None:
    rotary_emb = make_rotary("default", torch.float32)
    with pytest.raises(ConfigError, match="Give shift in tokens"):
        shift_tokens(StringOptions(shift=0.3), rotary_emb, SimpleNamespace())
    with pytest.raises(ConfigError, match=r"Raise shift or lower window"):
        shift_tokens(StringOptions(shift=0.3), rotary_emb, SimpleNamespace(max_position_embeddings=256))


def test_shift_of_a_layer() -> None:
    rotary_emb = make_rotary("partial", torch.bfloat16, is_neox=False)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(max_position_embeddings=MAX_POSITION)),
        device_config=SimpleNamespace(device_type="cpu"),
    )
    model = torch.nn.ModuleList([attention_parent(rotary_emb, "x.attn")])
    string = string_shift_for_layer(model, vllm_config, "x.attn", StringOptions(shift=0.5, window=100))
    assert (string.shift, string.window, string.is_neox, string.rotary_dim) == (2048, 100, False, HEAD_DIM // 2)
