"""Options of single requests: `SamplingParams.extra_args`, or `vllm_xargs` over HTTP, with names `farspan.*`."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from farspan.engine_ext.config import DensePrefill, FarspanConfig, FlexPrefill, Prefill, suggestion
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.plan import StepPlan

PREFIX = "farspan."
OVERRIDES = ("farspan.method", "farspan.gamma")


class RequestSource(Protocol):
    """What a metadata builder learns from the model runner that calls it."""

    def prefills(self, common_attn_metadata: Any) -> Sequence[Prefill]:
        """How each request of a batch prefills, in batch order; the engine's own way for padding."""
        ...

    def plan(self) -> StepPlan | None:
        """What the scheduler decided for the step that is running; None where it sends no plans."""
        ...

    def model(self) -> Any:
        """The torch module that the runner runs."""
        ...


_make_source: Callable[[Any], RequestSource] | None = None


def set_source_factory(make_source: Callable[[Any], RequestSource]) -> None:
    """Tell builders how to reach the runner. make_source: from an engine's vLLM config."""
    global _make_source
    _make_source = make_source


def source_of(vllm_config: Any) -> RequestSource:
    assert _make_source is not None, "the plugin's register() connects the runner"
    return _make_source(vllm_config)


def prefill_of_request(config: FarspanConfig, extra_args: Mapping[str, Any] | None) -> Prefill:
    """How one request prefills: the engine's options with the request's overrides.

    Raises ConfigError naming the override, the value given, what is allowed and what to do.
    """
    overrides = {name: value for name, value in (extra_args or {}).items() if name.startswith(PREFIX)}
    if not overrides:
        return config.prefill
    for name, value in overrides.items():
        if name not in OVERRIDES:
            raise ConfigError(
                f"{name}={value!r}; a request can set {' and '.join(OVERRIDES)}. {suggestion(name, OVERRIDES)}"
            )
    prefill = config.prefill
    if "farspan.method" in overrides:
        prefill = prefill_by_method(prefill, overrides["farspan.method"])
    if "farspan.gamma" in overrides:
        prefill = prefill_by_gamma(prefill, overrides["farspan.gamma"])
    return prefill


def prefill_by_method(prefill: Prefill, method: Any) -> Prefill:
    engine_method = msgspec.to_builtins(prefill)["method"]
    if method == engine_method:
        return prefill
    if method == "dense":
        return DensePrefill()
    allowed = " or ".join(repr(name) for name in dict.fromkeys(("dense", engine_method)))
    raise ConfigError(
        f"farspan.method={method!r}; allowed: {allowed}. Another method needs an engine that was started with it "
        "(prefill.method)."
    )


def prefill_by_gamma(prefill: Prefill, gamma: Any) -> Prefill:
    if not isinstance(prefill, FlexPrefill):
        raise ConfigError(
            f"farspan.gamma={gamma!r}; allowed: only where the request prefills with method 'flex'. Leave it out."
        )
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 < gamma <= 1:
        raise ConfigError(f"farspan.gamma={gamma!r}; allowed: a number in (0, 1]. Use 0.95, or 0.9 for more speed.")
    return msgspec.structs.replace(prefill, gamma=float(gamma))


def cache_salt(config: FarspanConfig, prefill: Prefill) -> str | None:
    """The salt of a request's prefix-cache blocks; None where its KV is exact.

    Two requests get the same salt exactly when the options that shape their KV are equal.
    """
    effective = msgspec.structs.replace(config, prefill=prefill, kernel="auto")
    if not effective.changes_kv:
        return None
    digest = hashlib.sha256(msgspec.json.encode(effective, order="deterministic")).hexdigest()
    return f"farspan-{digest[:16]}"
