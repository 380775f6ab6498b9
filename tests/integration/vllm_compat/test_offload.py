"""How vLLM plans its KV cache."""

from typing import Any

from farspan.vllm_compat.offload import planning


def test_engines_without_cold_heads_are_planned_as_ever() -> None:
    """With the groups of the layers too, which the planner of vLLM 0.33 is given."""
    calls: list[Any] = []
    for arguments in (("config", [{}], [1]), ("config", [{}], [1], ["groups"])):
        planning(lambda *given: calls.append(given))(*arguments)
        assert calls.pop() == arguments
