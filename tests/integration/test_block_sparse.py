"""block_sparse through a real engine on the CPU."""

from typing import Any

import numpy as np
import pytest

from tests.integration.test_engine_tokens import generate, launches, make_prompts, run

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]


def engine(make_llm: Any, prefill: dict[str, Any] | None, **kwargs: Any) -> Any:
    options = {"farspan": {"prefill": prefill}} if prefill else {}
    defaults = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "enable_prefix_caching": False}
    return make_llm(additional_config=options, **(defaults | kwargs))


def test_a_full_mask_is_dense(make_llm: Any, tmp_path: Any) -> None:
    prompts = make_prompts((1, 63, 300, 700))
    np.save(tmp_path / "full.npy", np.ones((1, 1, 32, 32), dtype=bool))
    dense = generate(engine(make_llm, None), prompts)
    prefill = {"method": "block_sparse", "pattern": "file", "block_size": 64, "mask_file": str(tmp_path / "full.npy")}
    llm = engine(make_llm, prefill)
    assert generate(llm, prompts) == dense
    counts = launches(llm)
    assert counts["prefill_sparse"] > 0
    assert "prefill_dense" not in counts


def test_masks_per_layer_and_head(make_llm: Any, tmp_path: Any) -> None:
    prompts = make_prompts((300, 700))
    mask = np.ones((2, 4, 32, 32), dtype=bool)
    mask[1, 2] = np.eye(32, dtype=bool)
    np.save(tmp_path / "mask.npy", mask)
    dense = generate(engine(make_llm, None), prompts)
    prefill = {"method": "block_sparse", "pattern": "file", "block_size": 64, "mask_file": str(tmp_path / "mask.npy")}
    assert generate(engine(make_llm, prefill), prompts) != dense


def test_sink_local_does_not_depend_on_chunks_or_prefix_hits(make_llm: Any) -> None:
    prefill = {"method": "block_sparse", "pattern": "sink_local", "block_size": 64, "sink_blocks": 1, "local_blocks": 2}
    prompts = make_prompts((129, 700, 1000))
    expected = generate(engine(make_llm, prefill, max_num_batched_tokens=2048), prompts)
    assert expected != generate(engine(make_llm, None), prompts)
    assert generate(engine(make_llm, prefill, max_num_batched_tokens=100), prompts) == expected
    llm = engine(make_llm, prefill, block_size=32, enable_prefix_caching=True)
    assert generate(llm, prompts) == expected
    outputs = run(llm, prompts)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert all(output.num_cached_tokens >= 128 for output in outputs)


def test_a_mask_that_is_too_small_is_refused(make_llm: Any, tmp_path: Any) -> None:
    np.save(tmp_path / "small.npy", np.ones((1, 1, 4, 4), dtype=bool))
    prefill = {"method": "block_sparse", "pattern": "file", "mask_file": str(tmp_path / "small.npy")}
    with pytest.raises(ValueError, match="covers prompts of 512 tokens, but max_model_len is 2048"):
        engine(make_llm, prefill)
