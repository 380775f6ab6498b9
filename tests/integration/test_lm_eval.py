"""The lm-eval command in docs/evaluation.md starts vLLM with our backend."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_engine_tokens import generate, launches, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluation.md"
ON_CPU = {"max_model_len": 2048, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 4}


def documented_arguments(model: Any) -> dict[str, Any]:
    """The document's --model_args for another model, made small."""
    (text,) = re.findall(r"--model_args '(\{.*\})'", DOCUMENT.read_text())
    arguments = json.loads(text)
    assert arguments["pretrained"] == "MODEL"
    assert arguments["attention_backend"] == "CUSTOM"
    return arguments | {"pretrained": str(model)} | ON_CPU


def test_documented_arguments_make_an_engine(make_llm: Any, model_dirs: Any) -> None:
    """Lm-eval renames `pretrained` to `model` and hands the rest to `vllm.LLM`."""
    arguments = documented_arguments(model_dirs("llama"))
    del arguments["pretrained"]
    llm = make_llm("llama", arguments.pop("attention_backend"), **arguments)
    assert generate(llm, make_prompts((100,)))
    assert launches(llm)["prefill_dense"] > 0
