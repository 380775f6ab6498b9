"""Options of single requests: `SamplingParams.extra_args`, or `vllm_xargs` over HTTP, with names `farspan.*`."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from farspan.engine_ext.config import (
    BlockSparsePrefill,
    DensePrefill,
    FarspanConfig,
    FlexPrefill,
    Prefill,
)
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.plan import StepPlan
from farspan.engine_ext.refusing import suggestion
from farspan.engine_ext.star.shard import NAME as STAR
from farspan.engine_ext.star.shard import Shard
from farspan.engine_ext.star.windows import WindowShard, decode_shard

if TYPE_CHECKING:
    from farspan.engine_ext.offload.cache import ColdCache

NAME = "farspan"
OVERRIDES = ("farspan.method", "farspan.gamma")


class RequestSource(Protocol):
    """What a metadata builder learns from the model runner that calls it."""

    def prefills(self, common_attn_metadata: Any) -> Sequence[Prefill]:
        """How each request of a batch prefills, in batch order; the engine's own for padding and dummy rows."""
        ...

    def prompt_lens(self, common_attn_metadata: Any) -> Sequence[int | None]:
        """Tokens of each request's whole prompt, in batch order; None for padding and dummy rows."""
        ...

    def shards(self, common_attn_metadata: Any) -> Sequence[Shard | None]:
        """What each request of a batch is to Star Attention, in batch order; None for ordinary requests and padding."""
        ...

    def plan(self) -> StepPlan | None:
        """The scheduler's plan for the step that runs; None with a scheduler that makes none, and outside of steps."""
        ...

    def missing(self, common_attn_metadata: Any) -> Sequence[bool]:
        """Whether each request of a batch, in batch order, has pages of cold heads in no slot, as the plan says."""
        ...

    def cold_cache(self) -> "ColdCache | None":
        """The runner's pages of cold heads; asked while the KV cache is set up."""
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


def names_like_ours(names: Iterable[Any]) -> list[str]:
    """The names that a user can only have meant for farspan, spelt right or not: `farspan.gamma`, `Farspan_gamma`."""
    return [name for name in names if isinstance(name, str) and name.lower().startswith(NAME)]


def refuse_overrides(extra_args: Mapping[str, Any] | None, reason: str) -> None:
    """Raise ConfigError if a request that cannot have overrides has any; reason: why it cannot, and what to do."""
    for name in names_like_ours(extra_args or {}):
        raise ConfigError(f"{name}={(extra_args or {})[name]!r}; {reason}")


def prefill_of_request(config: FarspanConfig, extra_args: Mapping[str, Any] | None) -> Prefill:
    """How one request prefills: the engine's options with the request's overrides.

    Raises ConfigError naming the override, the value given, what is allowed and what to do.
    """
    extra_args = extra_args or {}
    overrides = {name: extra_args[name] for name in names_like_ours(extra_args) if name != STAR}
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


def shard_of_request(
    config: FarspanConfig, extra_args: Mapping[str, Any] | None, page_size: int, prompt_len: int | None = None
) -> Shard | None:
    """A host's share of a request's context; None for an ordinary request.

    page_size: tokens of a page of the engine's KV cache; prompt_len: of the request, where it is known.
    Raises ConfigError.
    """
    if not extra_args or STAR not in extra_args:
        return None
    if config.star is None:
        raise ConfigError(
            f"{STAR}; allowed: only in an engine that was started with the option star. Use farspan.star.StarLLM, "
            "which starts such engines."
        )
    shard = decode_shard(extra_args[STAR])
    shard.check(page_size, prompt_len)
    if config.offload is not None and isinstance(shard, WindowShard):
        raise ConfigError(
            f"{STAR}.visibility='all'; allowed: 'star' together with offload: hosts gather keys from GPU memory alone. "
            "Leave out offload, or visibility."
        )
    return shard


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


def options_digest(config: FarspanConfig, prefill: Prefill) -> str | None:
    """A digest of everything that shapes a request's KV: its prefill, the option string, a mask file's content.

    None where the KV is exact. prefill: the request's own. Raises OSError if the mask file cannot be read.
    """
    effective = msgspec.structs.replace(config, prefill=prefill, preset=None, kernel="auto", offload=None, star=None)
    if not effective.changes_kv:
        return None
    mask_digest = None
    if isinstance(prefill, BlockSparsePrefill) and prefill.mask_file is not None:
        mask_digest = digest_of_file(prefill.mask_file)
        effective = msgspec.structs.replace(effective, prefill=msgspec.structs.replace(prefill, mask_file=None))
    return hashlib.sha256(msgspec.json.encode([effective, mask_digest], order="deterministic")).hexdigest()


@functools.cache
def digest_of_file(path: str) -> str:
    """sha256 of a file, read once per process: masks are loaded once too."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def cache_salt(user_salt: str | None, digest: str | None) -> str | None:
    """The salt of a request's prefix-cache blocks; None for exact KV of a request without a salt of its own.

    digest: see `options_digest`. Users' salts are hashed too, so that none of them can equal a salt made here: requests
    share blocks only if both the user's salt and the digest are equal.
    """
    if not user_salt and digest is None:
        return None
    pair = msgspec.json.encode([user_salt or None, digest])
    return f"farspan-{hashlib.sha256(pair).hexdigest()}"
