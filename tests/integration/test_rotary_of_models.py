"""The rotary modules of models as vLLM builds them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from farspan.engine_ext.config import StringOptions
from farspan.engine_ext.string import string_turn_for_layer

from tests.integration.tiny_models import HEAD_DIM, LAYERS, NUM_HEADS

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("architecture", NUM_HEADS)
def test_every_layer_has_its_shift(make_llm: Callable[..., Any], architecture: str) -> None:
    llm = make_llm(architecture, "CUSTOM")
    vllm_config = llm.llm_engine.vllm_config
    # A mixture's experts are in the context too.
    layer_names = [name for name in vllm_config.compilation_config.static_forward_context if name.endswith(".attn")]
    assert len(layer_names) == LAYERS
    options = StringOptions(shift=0.25, window=64)

    def shifts(model: torch.nn.Module) -> list[Any]:
        return [string_turn_for_layer(model, vllm_config, name, options) for name in layer_names]

    for string in llm.apply_model(shifts)[0]:
        assert (string.slope, string.offset, string.is_neox, string.rotary_dim) == (1, 1 - 1024, True, HEAD_DIM)
        frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        torch.testing.assert_close(string.cos, ((64 - 1024) * frequencies).cos().float(), atol=2e-4, rtol=0)
