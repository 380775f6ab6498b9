"""Requests on their way in: validated in the front end and again in the core, where their blocks are marked."""

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from farspan.engine_ext.config import FarspanConfig, Prefill
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.star.shard import NAME as STAR
from farspan.engine_ext.star.windows import decode_shard
from farspan.vllm_compat.platform import chooses_farspan
from farspan.vllm_compat.wrapping import wrap_once

WITHOUT_US = (
    "this engine runs another attention backend, which reads no such option. Remove it, or start the engine with "
    "--attention-backend CUSTOM."
)
IN_THE_BODY = (
    "this is a field of the request itself, which nobody reads. Options of a request are under vllm_xargs, as in "
    '{"vllm_xargs": {"farspan.gamma": 0.9}}.'
)
SESSION_OF_STAR = (
    "a chunk of a streaming session together with star; allowed: whole prompts, which is what hosts share. Send one "
    "prompt, or start an engine without the option star."
)
BEAM_SEARCH = "beam search passes no options of single requests on. Remove it, or leave out use_beam_search."


# vLLM has no hook on incoming requests. Drop when backends can validate and salt them (not in 0.33).
def follow_requests() -> None:
    """Validate requests wherever they enter this process, and mark their blocks where it hashes them."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    wrap_once(InputProcessor, "process_inputs", validating)
    wrap_once(InputProcessor, "__init__", watching_http_requests)
    wrap_once(EngineCore, "preprocess_add_request", marking)
    mark_star_pages()


class Mark(NamedTuple):
    """What a request's blocks are shared by."""

    user_salt: str | None
    digest: str | None
    """Of the options that shape the KV; None where it is exact."""


def options_of(vllm_config: Any, request: Any) -> tuple[FarspanConfig, Prefill] | None:
    """The engine's options and a request's prefill, or None in an engine without us. Raises ConfigError.

    request: vLLM's EngineCoreRequest.
    """
    from farspan.engine_ext.requests import prefill_of_request, refuse_overrides, shard_of_request
    from farspan.engine_ext.support import config_of

    extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
    if not chooses_farspan(vllm_config):
        refuse_overrides(extra_args, WITHOUT_US)
        return None
    config = config_of(vllm_config)
    if request.resumable and config.star is not None:
        raise ConfigError(SESSION_OF_STAR)
    if extra_args and STAR in extra_args:
        prompt = request.prompt_token_ids
        shard_of_request(config, extra_args, vllm_config.cache_config.block_size, prompt and len(prompt))
    return config, prefill_of_request(config, extra_args)


def validating(stock: Callable[..., Any]) -> Callable[..., Any]:
    """In the front end, where a refusal reaches the client as a sentence."""
    from vllm.exceptions import VLLMValidationError

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = stock(self, *args, **kwargs)
        try:
            options_of(self.vllm_config, request)
        except ConfigError as error:
            # The server answers 400 to vLLM's own validation errors alone.
            raise VLLMValidationError(str(error), parameter="extra_args") from error
        return request

    return process_inputs


def marking(stock: Callable[..., Any]) -> Callable[..., Any]:
    """In the core, which every request passes and which hashes blocks; vLLM fails a refused request alone."""
    from farspan.engine_ext.requests import cache_salt, options_digest

    def preprocess_add_request(self: Any, request: Any) -> Any:
        options = options_of(self.vllm_config, request)
        if options is None:
            return stock(self, request)
        mark = Mark(request.cache_salt, options_digest(*options))
        sessions = self.__dict__.setdefault("farspan_sessions", weakref.WeakValueDictionary())
        session = sessions.get(request.request_id)
        if session is not None and request.resumable:
            check_continuation(self, session, mark)
        # A copy: what vLLM sends back to the front end after an error has the user's salt.
        marked = msgspec.structs.replace(request, cache_salt=cache_salt(*mark))
        added, wave = stock(self, marked)
        if session is None and request.resumable:
            added.farspan_mark = mark
            # An entry goes when the scheduler lets go of the session.
            sessions[request.request_id] = added
        return added, wave

    return preprocess_add_request


# A salt enters at the first page only. Drop when requests can name extra hash keys by position (not in 0.33).
def mark_star_pages() -> None:
    """Let the hash of a page of Star Attention hold what its KV depends on beside its tokens; exact pages stay shared.

    Other users of vLLM's function ask what to publish of a page, not how to hash it.
    """
    from vllm.v1.core import kv_cache_utils

    if hasattr(kv_cache_utils, "_farspan_marks_star_pages"):
        return
    stock = kv_cache_utils.generate_block_hash_extra_keys

    @functools.wraps(stock)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = stock(request, start_token_idx, end_token_idx, start_mm_idx)
        params = request.sampling_params
        if params is None or not params.extra_args or STAR not in params.extra_args:
            return keys, next_mm_idx
        ours = decode_shard(params.extra_args[STAR]).page_keys(start_token_idx)
        return ((*(keys or ()), *ours) or None), next_mm_idx

    kv_cache_utils.generate_block_hash_extra_keys = generate_block_hash_extra_keys
    kv_cache_utils._farspan_marks_star_pages = True


def check_continuation(core: Any, session: Any, mark: Mark) -> None:
    """Raise ConfigError, and end the session, if the next chunk of a streaming session has other options.

    Its KV would be shared under the options of the first chunk, by which the session's blocks are hashed.
    """
    first = session.farspan_mark
    if mark.digest == first.digest and mark.user_salt in (None, first.user_salt):
        return
    end_session(core, session.request_id)
    raise ConfigError(
        f"request {session.request_id}: a later chunk of a streaming session has other farspan options, or another "
        "cache_salt, than the first; allowed: the same in all chunks. Start another session for other options."
    )


def end_session(core: Any, request_id: str) -> None:
    """Abort a session whose client has been told of an error; vLLM ends it in the front end alone."""
    from vllm.v1.engine import EngineCoreRequestType

    # The in-process core has no queues: its caller gets the exception and still owns the session.
    if hasattr(core, "aborts_queue"):
        core.aborts_queue.put_nowait([request_id])
        core.input_queue.put_nowait((EngineCoreRequestType.ABORT, [request_id]))


# The server drops fields that it does not know, and beam search makes fresh SamplingParams without extra_args. Drop
# when neither is so (not in 0.33).
def watching_http_requests(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what would have no effect in requests over HTTP; LLM takes neither unknown fields nor, for beams, options.

    From a front end's start on: the server's modules are not to be loaded in cores and workers.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

        stock(self, *args, **kwargs)
        for request_cls in (ChatCompletionRequest, CompletionRequest):
            wrap_once(request_cls, "to_beam_search_params", refusing_overrides)
        for request_cls in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
            wrap_once(request_cls, "to_sampling_params", refusing_fields)

    return __init__


def refusing_overrides(stock: Callable[..., Any]) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse("vllm_xargs", self.vllm_xargs, BEAM_SEARCH)
        refuse("body", self.model_extra, BEAM_SEARCH)
        return stock(self, *args, **kwargs)

    return to_beam_search_params


def refusing_fields(stock: Callable[..., Any]) -> Callable[..., Any]:
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        refuse("body", self.model_extra, IN_THE_BODY)
        return stock(self, *args, **kwargs)

    return to_sampling_params


def refuse(parameter: str, extra_args: Mapping[str, Any] | None, reason: str) -> None:
    """Raise vLLM's own validation error, which the server answers with 400, for names like ours."""
    from farspan.engine_ext.requests import refuse_overrides
    from vllm.exceptions import VLLMValidationError

    try:
        refuse_overrides(extra_args, reason)
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter=parameter) from error
