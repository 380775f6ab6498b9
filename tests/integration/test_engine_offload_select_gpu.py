"""Selective decode on a GPU: in CUDA graphs, and nobody waits."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_engine_guards import watch_waits
from tests.integration.test_engine_offload import PROMPTS, offload_state, run_checked
from tests.integration.test_engine_offload_gpu import IN_GRAPHS, plain
from tests.integration.test_engine_offload_select import metrics_of, selecting
from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]


@pytest.fixture(autouse=True)
def _few_recent_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.kernels.page_choice.SELECT_RECENT_TOKENS", 32)
    monkeypatch.setattr("farspan.engine_ext.offload.selection.AUDIT_EVERY", 3)


def test_in_graphs(make_llm: Callable[..., Any]) -> None:
    """All of the mass gives the tokens of no offload; less is kept as promised."""
    reference = make_llm(**plain(farspan={"kernel": "triton"}), **IN_GRAPHS)
    expected = generate(reference, PROMPTS)
    reference.llm_engine.engine_core.shutdown()
    llm = make_llm(**selecting(14, 1.0, farspan={"kernel": "triton"}), **IN_GRAPHS)
    assert generate(llm, PROMPTS) == expected
    assert offload_state(llm)["spilled"] > 0
    llm.llm_engine.engine_core.shutdown()
    llm = make_llm(**selecting(14, 0.8, disable_log_stats=False), **IN_GRAPHS)
    run_checked(llm, make_prompts((700, 650), seed=3), 30)
    told = metrics_of(llm)
    assert told["select_audited"] > 0
    assert told["select_kept"] / told["select_audited"] >= 0.78
    assert told["select_certified"] <= told["select_kept"] + 1e-3
    ((read, on_host),) = llm.collective_rpc("selected_pages")
    assert 0 < read < on_host


def test_selection_never_waits_for_the_device(make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.engine_ext.impl import FarspanImpl
    from farspan.engine_ext.metadata import FarspanMetadataBuilder
    from farspan.engine_ext.offload.cache import ColdCache

    llm = make_llm(**selecting(14, 0.8))
    calls = watch_waits(monkeypatch, (FarspanMetadataBuilder, "build"), (ColdCache, "follow"), (FarspanImpl, "forward"))
    generate(llm, PROMPTS, 30)
    assert min(calls.values()) > 0
    assert offload_state(llm)["spilled"] > 0
