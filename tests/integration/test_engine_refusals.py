"""An engine that cannot work is refused when it is made, with the sentence of the refusal."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from farspan import vllm_compat
from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.vllm_compat import versions

from tests.integration.tiny_models import LAYERS

pytestmark = [pytest.mark.filterwarnings("default")]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prefill": {"method": "flex", "gamma": 7}}, "prefill.gamma=7; allowed: a number in"),
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


def configure(folder: Path, **arguments: Any) -> Any:
    """What the front end does before any engine starts."""
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"skip_tokenizer_init": True, "attention_backend": "CUSTOM", "dtype": "float32", "max_model_len": 512}
    return EngineArgs(str(folder), **(defaults | arguments)).create_engine_config()


def mask_options(path: Path) -> dict[str, Any]:
    return {"farspan": {"prefill": {"method": "block_sparse", "pattern": "file", "mask_file": str(path)}}}


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.write_bytes(b""), "it cannot be read as npy"),
        (lambda path: np.save(path, np.ones((LAYERS + 1, 1, 4, 4), bool)), "masks for 3 layers; allowed: 1 or 2."),
        (lambda path: np.save(path, np.ones((1, 3, 4, 4), bool)), "it has masks for 3 heads; allowed: 1 or 2 or 4."),
        (lambda path: np.save(path, np.ones((1, 1, 3, 3), bool)), "covers prompts of 384 tokens"),
    ],
    ids=["missing", "empty", "layers", "heads", "length"],
)
def test_mask_files_are_refused_in_the_front_end(
    tmp_path: Path, model_dirs: Callable[[str], Path], write: Callable[[Path], Any], sentence: str
) -> None:
    path = tmp_path / "mask.npy"
    write(path)
    with pytest.raises(ValueError, match="mask_file") as caught:
        configure(model_dirs("llama"), additional_config=mask_options(path))
    assert f"mask_file={str(path)!r}: " in str(caught.value)
    assert sentence in str(caught.value)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("options", "changes", "sentence"),
    [
        ({}, {"v_head_dim": 32}, "values of head size 32 with keys of 64; farspan supports equal sizes."),
        ({}, {"attention_chunk_size": 64}, "has chunked local attention; farspan supports decoders with plain GQA."),
        ({"string": {"shift": 0.02}}, {}, "of the trained length, 4096 tokens, is 81 tokens, less than window=128"),
        ({"string": {}}, {"no_rope_layers": [1, 0]}, "has layers without rotary positions"),
        (
            {"string": {}},
            {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
            "has multimodal rotary positions (mrope)",
        ),
    ],
    ids=["value-size", "chunked-local", "window", "no-rope-layers", "mrope"],
)
def test_models_and_string_are_refused_in_the_front_end(
    tmp_path: Path, model_dirs: Callable[[str], Path], options: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    config = json.loads((model_dirs("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        configure(tmp_path, additional_config={"farspan": options})


@pytest.mark.e2e
def test_string_in_the_transformers_backend_is_refused_in_the_front_end(model_dirs: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"string: .* runs in vLLM's Transformers backend"):
        configure(model_dirs("llama"), model_impl="transformers", additional_config={"farspan": {"string": {}}})


@pytest.mark.e2e
def test_options_at_the_top_level_are_refused_where_farspan_is_chosen(model_dirs: Callable[[str], Path]) -> None:
    options = {"prefill": {"method": "flex"}}
    with pytest.raises(ValueError, match="has 'prefill' at its top level"):
        configure(model_dirs("llama"), additional_config=options)
    configure(model_dirs("llama"), additional_config=options, attention_backend=None)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"offload": {}}, "a KV connector together with offload"),
        ({"prefill": {"method": "flex"}}, "a KV connector together with sparse prefill or string"),
        ({"star": {}}, "star together with a KV connector"),
    ],
    ids=["offload", "flex", "star"],
)
def test_vllms_own_kv_offloading_is_refused_in_the_front_end(
    model_dirs: Callable[[str], Path], options: dict[str, Any], sentence: str
) -> None:
    """The connector of --kv-offloading-size is made after the checks of the plugin."""
    with pytest.raises(UnsupportedEngineError, match=sentence):
        configure(model_dirs("llama"), kv_offloading_size=1.0, additional_config={"farspan": options})
    assert configure(model_dirs("llama"), kv_offloading_size=1.0).kv_transfer_config is not None


@pytest.mark.e2e
def test_what_fits_is_configured(tmp_path: Path, model_dirs: Callable[[str], Path]) -> None:
    np.save(tmp_path / "mask.npy", np.ones((LAYERS, 2, 4, 4), bool))
    configure(model_dirs("llama"), additional_config=mask_options(tmp_path / "mask.npy"))
    configure(model_dirs("llama"), additional_config={"farspan": {"string": {}, "prefill": {"method": "flex"}}})


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
