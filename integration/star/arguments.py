"""What `StarLLM` and its requests may be given; everything else is refused with a sentence."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from farspan import tokenizer
from farspan.engine_ext.errors import ConfigError
from farspan.needle import local_name

MARKER = "<|query|>"
"""Splits a prompt given in one piece into context and query; it is not part of either."""

Tokens = str | Sequence[int]


def sampling_params(**arguments: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**arguments)


def checked_params(params: Any) -> Any:
    """A copy whose tokens all hosts choose alike. Raises ConfigError for what needs the whole prompt on one host."""
    params = sampling_params() if params is None else params.clone()
    if params.n != 1:
        raise ConfigError(f"n={params.n}; allowed: 1, one answer to a query. Call generate several times.")
    if params.repetition_penalty != 1:
        raise ConfigError(
            f"repetition_penalty={params.repetition_penalty}; allowed: 1, as it counts the prompt's tokens, of which "
            "every host has others. Use presence_penalty or frequency_penalty, which count new tokens."
        )
    if params.prompt_logprobs is not None:
        raise ConfigError(
            f"prompt_logprobs={params.prompt_logprobs}; allowed: None, as no host has the whole prompt. Leave it out."
        )
    if params.seed is None and params.temperature > 0:
        params.seed = random.getrandbits(63)
    return params


def split_prompt(tokenizer: Any, context: Tokens, query: Tokens | None) -> tuple[list[int], list[int]]:
    """Token ids of context and query; special tokens stand at the start of the context alone.

    tokenizer: of transformers; None where only token ids can be given. Raises ConfigError for what has no such parts.
    """
    for part in (context, query):
        if part is not None and not isinstance(part, Iterable):
            raise ConfigError(
                f"a prompt of type {type(part).__name__}; allowed: text or token ids, whole. Hosts have no streaming "
                "sessions: collect the chunks first."
            )
    if query is None and isinstance(context, str):
        before, marker, after = context.partition(MARKER)
        if not marker:
            raise ConfigError(
                f"a prompt without {MARKER!r}; allowed: context and query apart, or in one text with {MARKER!r} "
                "between them. Pass the query as the second argument."
            )
        context, query = before, after
    if isinstance(context, str) or isinstance(query, str):
        if tokenizer is None:
            raise ConfigError("text with skip_tokenizer_init; allowed: token ids. Pass lists of ints.")
        if isinstance(context, str):
            context = tokenizer.encode(context)
        if isinstance(query, str):
            query = tokenizer.encode(query, add_special_tokens=False)
    context_ids: list[int] = list(context)  # type: ignore[arg-type]
    query_ids: list[int] = list(query or [])  # type: ignore[arg-type]
    if not context_ids and not query_ids:
        raise ConfigError("an empty context and an empty query; allowed: at least one token. Give a prompt.")
    return context_ids, query_ids


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raise ConfigError unless all are token ids of the model."""
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ConfigError(
                f"token {token!r}; allowed: whole numbers from 0 to {vocab_size - 1}, this model's tokens. Use its own "
                "tokenizer."
            )


def check_engine_arguments(engine: dict[str, Any]) -> None:
    """Raise ConfigError for arguments of `LLM` that StarLLM sets itself or that hosts cannot have."""
    owned = {
        "additional_config": "give farspan's options as options={...}",
        "attention_backend": "leave it out: hosts need CUSTOM",
        "distributed_executor_backend": "leave it out: a host starts its own processes",
    }
    for name, remedy in owned.items():
        if name in engine:
            raise ConfigError(f"{name}={engine[name]!r}; allowed: not with StarLLM, which sets it. Instead, {remedy}.")
    if engine.get("enable_prefix_caching", True) is not True:
        raise ConfigError(
            "enable_prefix_caching=False; allowed: True with StarLLM, whose second phase reads the pages of the first. "
            "Leave it out."
        )
    unserved = {"enable_lora": "requests name no adapter", "enable_sleep_mode": "hosts are not told to sleep"}
    for name, reason in unserved.items():
        if engine.get(name):
            raise ConfigError(f"{name}={engine[name]!r}; allowed: not with StarLLM, whose {reason}. Leave it out.")
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        if engine.get(name, 1) != 1:
            raise ConfigError(
                f"{name}={engine[name]!r}; allowed: 1. Use more hosts, or tensor_parallel_size for more GPUs in each."
            )
    num_ranks = engine.get("tensor_parallel_size", 1)
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, int) or num_ranks < 1:
        raise ConfigError(f"tensor_parallel_size={num_ranks!r}; allowed: a whole number from 1, the GPUs of a host.")
    if num_ranks > 1 and engine.get("async_scheduling"):
        raise ConfigError(
            "async_scheduling=True with tensor_parallel_size; allowed: False, as hosts end a request at the same step. "
            "Leave it out."
        )


def load_tokenizer(model: str, engine: dict[str, Any]) -> Any:
    """The model's tokenizer. Raises ConfigError where there is none."""
    return tokenizer.load_tokenizer(
        str(engine.get("tokenizer") or local_name(model)),
        bool(engine.get("trust_remote_code", False)),
        ", or skip_tokenizer_init=True and token ids",
    )
