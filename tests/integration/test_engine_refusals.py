"""An engine that cannot work is refused when it is made, with the sentence of the refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from farspan import vllm_compat
from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.vllm_compat import versions

pytestmark = [pytest.mark.filterwarnings("default")]

MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prefill": {"method": "flex", "gamma": 7}}, "prefill.gamma=7.0; allowed: a number in"),
        ({"kernel": "fa3"}, "kernel='fa3'; on the CPU platform"),
    ],
    ids=["gamma", "fa3-on-cpu"],
)
def test_options(make_llm: Callable[..., Any], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        make_llm(additional_config={"farspan": options})
    assert sentence in str(caught.value)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 80, "num_attention_heads": 4}, "head_size=80; farspan supports 64, 96, 128, 256."),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128},
            "sliding_window=128",
        ),
    ],
    ids=["head-size", "sliding-window"],
)
def test_models(tmp_path: Path, model_dirs: Callable[[str], Path], changes: dict[str, Any], sentence: str) -> None:
    from vllm import LLM

    config = json.loads((model_dirs("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match="farspan supports") as caught:
        LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, attention_backend="CUSTOM", dtype="float32")
    assert sentence in str(caught.value)


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["farspan", "Farspan"])
def test_options_of_ours_in_an_engine_without_us(make_llm: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match="only with the attention backend CUSTOM"):
        make_llm(backend=None, additional_config={name: {"prefill": {"method": "flex"}}})


def test_microbatches_of_runner_v1() -> None:
    from farspan.vllm_compat.platform import refuse_mixed_up_microbatches

    def config(use_ubatching: bool, is_v2: bool) -> Any:
        parallel = SimpleNamespace(use_ubatching=use_ubatching)
        return SimpleNamespace(parallel_config=parallel, use_v2_model_runner=is_v2)

    refuse_mixed_up_microbatches(config(True, True))
    refuse_mixed_up_microbatches(config(False, False))
    with pytest.raises(UnsupportedEngineError, match="microbatches"):
        refuse_mixed_up_microbatches(config(True, False))


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1", "0.32.0+cpu", "0.33.0rc1", "0.32.1.dev3"])
def test_versions_served(version: str) -> None:
    assert versions.version_refusal(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused_when_chosen(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "vllm_version", lambda: version)
    with pytest.raises(UnsupportedEngineError, match=r"farspan supports vllm>=0\.32,<0\.34"):
        _ = vllm_compat.RefusedBackend


def test_registering_twice_changes_nothing() -> None:
    from farspan.plugin import register
    from vllm.platforms import current_platform

    register()
    before = type(current_platform).check_and_update_config
    register()
    assert type(current_platform).check_and_update_config is before
