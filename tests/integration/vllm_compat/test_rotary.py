"""What is read of vLLM's rotary modules and configurations, against the rotations that the modules themselves do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext.errors import UnsupportedModelError
from farspan.kernels.rotary_turn import apply_turn, make_string_turn
from farspan.vllm_compat.rotary import (
    ROPE_TYPES,
    check_rotary,
    find_rotary_emb,
    inverse_frequencies,
    rotation_of_layer,
    trained_len,
)
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
    string = make_string_turn(inverse_frequencies(rotary_emb), shift, window, is_neox, torch.device("cpu"))
    shifted = apply_turn(rotate(rotary_emb, position, query), string)
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


def test_finds_the_rotary_module_next_to_the_layer() -> None:
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


def test_rotation_of_a_layer() -> None:
    rotary_emb = make_rotary("partial", torch.bfloat16, is_neox=False)
    rotation = rotation_of_layer(torch.nn.ModuleList([attention_parent(rotary_emb, "x.attn")]), "x.attn")
    assert not rotation.is_neox
    assert torch.equal(rotation.inv_freq, inverse_frequencies(rotary_emb))
    assert len(rotation.inv_freq) == HEAD_DIM // 4


def model_config(text_config: Any, **changes: Any) -> Any:
    """A model's configuration, as far as it is looked at."""
    defaults = {"model": "m", "uses_mrope": False, "hf_overrides": {}, "using_transformers_backend": lambda: False}
    return SimpleNamespace(**(defaults | changes), hf_text_config=text_config)


def rotating(name: str, **changes: Any) -> Any:
    """A model that rotates by a scaling of SCALINGS."""
    parameters = {"rope_type": "default", **SCALINGS[name]}
    return SimpleNamespace(rope_parameters=parameters, max_position_embeddings=MAX_POSITION, **changes)


@pytest.mark.parametrize("name", SCALINGS)
def test_configurations_of_the_supported_scalings_pass(name: str) -> None:
    check_rotary(model_config(rotating(name)))


def test_all_supported_types_are_tried() -> None:
    assert set(ROPE_TYPES) == {parameters.get("rope_type", "default") for parameters in SCALINGS.values()}


def configuration(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (model_config(rotating("default"), uses_mrope=True), "has multimodal rotary positions"),
        (model_config(SimpleNamespace(rope_parameters={"rope_type": "openpangu"})), "of type 'openpangu'; string supp"),
        (
            model_config(SimpleNamespace(rope_parameters={"full_attention": {"rope_type": "deepseek_yarn"}})),
            "has rotary embeddings of type 'deepseek_yarn'",
        ),
        (model_config(SimpleNamespace(rope_parameters={"use_fope": True})), "has Fourier position embeddings"),
        (model_config(rotating("default", dual_chunk_attention_config={})), "has dual-chunk attention"),
        (model_config(rotating("default", no_rope_layers=[1, 1, 1, 0])), "has layers without rotary positions"),
        (model_config(configuration("opt")), "has no rotary positions to shift"),
        (model_config(rotating("default"), using_transformers_backend=lambda: True), "runs in vLLM's Transformers"),
    ],
    ids=["mrope", "type", "nested-type", "fourier", "dual-chunk", "nope", "no-rope", "transformers"],
)
def test_refuses_configurations(config: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        check_rotary(config)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("string: m ")
    assert str(caught.value).endswith(". Leave out the option string.")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "phi", "gpt_neox", "gptj", "falcon"])
def test_models_that_rotate_are_known_to(model_type: str) -> None:
    check_rotary(model_config(configuration(model_type)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", MAX_POSITION),
        ("llama3", MAX_POSITION),
        ("longrope", MAX_POSITION),
        ("yarn", 1024),
        ("dynamic", 1024),
        ("dynamic-alpha", MAX_POSITION),
    ],
)
def test_trained_length(name: str, expected: int) -> None:
    assert trained_len(model_config(rotating(name))) == expected


def test_trained_length_of_several_types_of_layers() -> None:
    parameters = {"full_attention": {"rope_type": "default"}, "sliding_attention": SCALINGS["yarn"]}
    config = SimpleNamespace(rope_parameters=parameters, max_position_embeddings=MAX_POSITION)
    assert trained_len(model_config(config)) == 1024


def test_trained_length_that_nobody_says() -> None:
    assert trained_len(model_config(SimpleNamespace())) is None


@pytest.mark.parametrize(
    "overrides",
    [
        {"max_position_embeddings": 65536},
        {"rope_parameters": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 8192}},
        lambda config: config.update({"max_position_embeddings": 65536}) or config,
    ],
    ids=["length", "rope", "callable"],
)
def test_trained_length_is_not_that_of_overrides(overrides: Any, model_dirs: Callable[[str], Path]) -> None:
    from vllm.config import ModelConfig

    folder = str(model_dirs("llama"))
    stretched = ModelConfig(folder, hf_overrides=overrides, skip_tokenizer_init=True, max_model_len=512)
    assert trained_len(stretched) == 4096
