"""The shift of a model comes from its own rotary embedding, whatever its scaling."""

from typing import Any

import pytest
import torch
from farspan.engine_ext.config import StringOptions
from farspan.engine_ext.errors import ConfigError, UnsupportedModelError
from farspan.engine_ext.shift import inverse_frequencies, shift_of_model

DIM, LENGTH, BASE = 64, 4096, 10000.0


class RotaryEmbedding:
    """What vLLM's module of that name offers; `scaling` divides positions, `magnitude` scales the cache."""

    is_neox_style = True
    max_position_embeddings = LENGTH

    def __init__(self, scaling: float = 1.0, magnitude: float = 1.0) -> None:
        self.scaling, self.magnitude = scaling, magnitude

    def frequencies(self) -> torch.Tensor:
        return 1.0 / BASE ** (torch.arange(0, DIM, 2, dtype=torch.float32) / DIM)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        angles = torch.outer(torch.arange(LENGTH, dtype=torch.float32) / self.scaling, self.frequencies())
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * self.magnitude


class OtherRotary(RotaryEmbedding):
    """An embedding of a kind that is not known."""


@pytest.mark.parametrize(
    ("scaling", "magnitude"), [(1.0, 1.0), (4.0, 1.0), (1.0, 1.2)], ids=["plain", "linear", "yarn"]
)
def test_inverse_frequencies(scaling: float, magnitude: float) -> None:
    rotary = RotaryEmbedding(scaling, magnitude)
    expected = rotary.frequencies().double() / scaling
    got = inverse_frequencies(rotary)
    # A shift of 100,000 tokens must not be off by a milliradian.
    assert ((got - expected).abs() * 1e5).max() < 1e-3


def model_with(*embeddings: Any) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    model, layers = torch.nn.Module(), []
    for index, rotary in enumerate(embeddings):
        parent, layer = torch.nn.Module(), torch.nn.Module()
        layer.layer_name = f"layers.{index}"
        parent.attn = layer
        if rotary is not None:
            parent.rotary_emb = rotary
        model.add_module(str(index), parent)
        layers.append(layer)
    return model, layers


def test_shift_of_model() -> None:
    rotary = RotaryEmbedding()
    model, layers = model_with(rotary, rotary)
    device = torch.device("cpu")
    shift = shift_of_model(StringOptions(shift=0.25, window=64), model, layers, 1000, device)
    assert (shift.shift, shift.window, shift.rotary_dim, shift.is_neox) == (250, 64, DIM, True)
    angle = rotary.frequencies().double() * (64 - 250)
    torch.testing.assert_close(shift.cos.double(), angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(shift.sin.double(), angle.sin(), atol=1e-5, rtol=0)
    assert shift_of_model(StringOptions(shift=300), model, layers, 1000, device).shift == 300


@pytest.mark.parametrize(
    ("embeddings", "options", "error", "sentence"),
    [
        ((None,), {}, UnsupportedModelError, "layer layers.0 has no rotary embedding"),
        ((OtherRotary(),), {}, UnsupportedModelError, "positions by OtherRotary; string supports RotaryEmbedding"),
        ((RotaryEmbedding(), RotaryEmbedding()), {}, UnsupportedModelError, "the model has 2 rotary embeddings"),
        ((RotaryEmbedding(),), {"shift": 0.1}, ConfigError, "window=128; allowed: at most the shift, which is 100"),
    ],
    ids=["none", "unknown", "several", "window"],
)
def test_refusals(embeddings: Any, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    model, layers = model_with(*embeddings)
    with pytest.raises(error) as caught:
        shift_of_model(StringOptions(**options), model, layers, 1000, torch.device("cpu"))
    assert sentence in str(caught.value)


def test_vllm_offers_what_is_read() -> None:
    from vllm.model_executor.layers import rotary_embedding

    for name in ("RotaryEmbedding", "Llama3RotaryEmbedding", "YaRNScalingRotaryEmbedding"):
        assert hasattr(getattr(rotary_embedding, name), "_compute_cos_sin_cache")
