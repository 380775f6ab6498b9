"""`farspan star serve`: vLLM's OpenAI-compatible requests and answers around one StarLLM, with streaming.

An ASGI application in the coordinator's process, beside the hosts' actors. Requests wait for each other; a client that
goes away aborts its request on all hosts. The query is what follows the marker `<|query|>` in the prompt; in a chat,
also the last user message if no marker is there.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Generator
from typing import Any

from farspan.engine_ext.errors import StarError
from farspan.star.arguments import MARKER
from farspan.star.llm import StarLLM
from farspan.star.metrics import StarMetrics
from farspan.star.output import StarOutput

UNSUPPORTED = (
    *("echo", "suffix", "logprobs", "prompt_logprobs", "logprob_token_ids", "tools", "use_beam_search", "priority"),
    *("cache_salt", "kv_transfer_params", "ec_transfer_params", "prompt_embeds", "truncate_prompt_tokens"),
    *("chat_template", "chat_template_kwargs", "continue_final_message", "documents", "reasoning_effort"),
    *("return_token_ids", "return_token_offsets", "return_tokens_as_token_ids", "return_prompt_text"),
)
"""Fields of requests that would change an answer, or who shares its KV, and are not passed on."""
FIXED = ("add_special_tokens", "add_generation_prompt")
"""Fields that have one value here, vLLM's default."""
NOT_GIVEN: tuple[Any, ...] = (None, False, [], {}, 0)


class UnknownModel(Exception):
    """A request names another model than the server's."""


class Queue:
    """One request at a time, in the order of their arrival."""

    def __init__(self, llm: StarLLM) -> None:
        self.llm = llm
        self.metrics = StarMetrics()
        self.order = asyncio.Lock()
        self.busy = threading.Lock()
        """Held until a request is really over, which may be after its client has gone."""

    async def stream(self, context: Any, query: Any, params: Any) -> AsyncIterator[list[int] | StarOutput]:
        """New token ids as they come, and the whole output at the end. Closing it aborts the request."""
        async with self.order:
            running = Running(self.llm.stream(context, query, params), self.busy)
            try:
                while (piece := await asyncio.to_thread(running.next)) is not None:
                    if isinstance(piece, StarOutput):
                        self.metrics.observe(piece.times)
                        yield piece
                        return
                    yield piece
            finally:
                # A client that leaves cancels this task, while a thread may still wait for the next piece.
                running.is_left = True
                await asyncio.shield(asyncio.to_thread(running.close))


class Running:
    """A request whose pieces are waited for in threads."""

    def __init__(self, pieces: Generator[list[int], None, StarOutput], busy: threading.Lock) -> None:
        self.pieces, self.busy = pieces, busy
        self.step = threading.Lock()
        self.is_left = self.is_begun = False

    def next(self) -> list[int] | StarOutput | None:
        """The next piece, or the output; None once the client has left."""
        with self.step:
            if not self.is_begun and not self.is_left:
                self.busy.acquire()
                self.is_begun = True
            if self.is_left:
                return None
            try:
                return next(self.pieces)
            except StopIteration as stop:
                output: StarOutput = stop.value
                return output

    def close(self) -> None:
        """End the request, after the piece that a thread waits for."""
        with self.step:
            self.pieces.close()
            if self.is_begun:
                self.is_begun = False
                self.busy.release()


def make_app(llm: StarLLM, model_name: str) -> Any:
    """The ASGI application: /health, /metrics, /v1/models, /v1/completions and /v1/chat/completions."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion
    from vllm.exceptions import VLLMValidationError

    app = FastAPI(title="farspan star")
    queue = Queue(llm)

    @app.exception_handler(ValueError)
    @app.exception_handler(VLLMValidationError)
    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem(str(error), "BadRequestError", 400), 400)

    @app.exception_handler(UnknownModel)
    async def miss(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem(str(error), "NotFoundError", 404), 404)

    @app.exception_handler(StarError)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem(str(error), "ServiceUnavailableError", 503), 503)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(queue.metrics.text())

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "farspan"}
        return JSONResponse({"object": "list", "data": [card]})

    @app.post("/v1/completions")
    async def complete(request: completion.CompletionRequest) -> Any:
        check_supported(request, model_name)
        prompt = request.prompt
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            raise ValueError("prompt: several prompts; allowed: one text or one list of token ids. Send them apart.")
        context: Any = prompt
        query: list[int] | None = None if isinstance(prompt, str) else []
        params = params_of(request, request.max_tokens)
        if request.stream:
            name = completion.CompletionStreamResponse(model=model_name, choices=[]).id

            def chunk(text: str, finish_reason: str | None, is_first: bool) -> Any:
                choice = completion.CompletionResponseStreamChoice(index=0, text=text, finish_reason=finish_reason)
                return completion.CompletionStreamResponse(id=name, model=model_name, choices=[choice])

            def last(output: StarOutput) -> Any:
                told = usage(completion, output)
                return completion.CompletionStreamResponse(id=name, model=model_name, choices=[], usage=told)

            ending = last if tells_usage(request) else None
            chunks = await started(events(queue.stream(context, query, params), llm.tokenizer, chunk, ending))
            return StreamingResponse(chunks, media_type="text/event-stream")
        output = await whole(queue.stream(context, query, params))
        choice = completion.CompletionResponseChoice(index=0, text=output.text, finish_reason=output.finish_reason)
        return completion.CompletionResponse(model=model_name, choices=[choice], usage=usage(completion, output))

    @app.post("/v1/chat/completions")
    async def converse(request: chat.ChatCompletionRequest) -> Any:
        check_supported(request, model_name)
        context = chat_text(llm.tokenizer, request.messages)
        params = params_of(request, request.max_completion_tokens or request.max_tokens)
        if request.stream:
            name = chat.ChatCompletionStreamResponse(model=model_name, choices=[]).id

            def chunk(text: str, finish_reason: str | None, is_first: bool) -> Any:
                delta = chat.DeltaMessage(role="assistant" if is_first else None, content=text)
                choice = chat.ChatCompletionResponseStreamChoice(index=0, delta=delta, finish_reason=finish_reason)
                return chat.ChatCompletionStreamResponse(id=name, model=model_name, choices=[choice])

            def last(output: StarOutput) -> Any:
                told = usage(chat, output)
                return chat.ChatCompletionStreamResponse(id=name, model=model_name, choices=[], usage=told)

            ending = last if tells_usage(request) else None
            chunks = await started(events(queue.stream(*context, params), llm.tokenizer, chunk, ending))
            return StreamingResponse(chunks, media_type="text/event-stream")
        output = await whole(queue.stream(*context, params))
        message = chat.ChatMessage(role="assistant", content=output.text)
        choice = chat.ChatCompletionResponseChoice(index=0, message=message, finish_reason=output.finish_reason)
        return chat.ChatCompletionResponse(model=model_name, choices=[choice], usage=usage(chat, output))

    return app


def check_supported(request: Any, model_name: str) -> None:
    """Raise ValueError for fields that would be ignored, UnknownModel for another model."""
    if request.model and request.model != model_name:
        raise UnknownModel(f"model={request.model!r}; this server has {model_name!r} alone. Name that one.")
    for name in UNSUPPORTED:
        if getattr(request, name, None) not in NOT_GIVEN:
            raise ValueError(f"{name}={getattr(request, name)!r}; farspan star does not support it. Leave it out.")
    for name in FIXED:
        if name in request.model_fields_set and getattr(request, name) != type(request).model_fields[name].default:
            raise ValueError(f"{name}={getattr(request, name)!r}; farspan star does not support it. Leave it out.")


def tells_usage(request: Any) -> bool:
    """Whether a stream ends with the numbers of tokens. Raises ValueError where all of its pieces should have them."""
    options = request.stream_options
    if options is not None and options.continuous_usage_stats:
        raise ValueError("stream_options.continuous_usage_stats; farspan star tells usage at the end. Leave it out.")
    return options is not None and bool(options.include_usage)


def params_of(request: Any, max_tokens: int | None) -> Any:
    """VLLM's SamplingParams of a request; without a limit, as many tokens as the hosts have room for."""
    params = request.to_sampling_params(max_tokens or 1, {})
    params.max_tokens = max_tokens
    return params


def chat_text(tokenizer: Any, messages: list[Any]) -> tuple[list[int], list[int]]:
    """Context and query of a conversation, as token ids: cut at the marker, or before the last user message."""
    from farspan.engine_ext.errors import ConfigError

    if tokenizer is None:
        raise ConfigError("chat with skip_tokenizer_init; allowed: completions of token ids. Start with a tokenizer.")
    plain = [dict(message) for message in messages]
    if any(not isinstance(message.get("content"), str) for message in plain):
        raise ConfigError("a message whose content is no text; allowed: text. Send plain strings.")
    if not any(MARKER in message["content"] for message in plain):
        last = max((at for at, message in enumerate(plain) if message["role"] == "user"), default=None)
        if last is None:
            raise ConfigError("messages without one of role 'user'; allowed: at least one. Add the question.")
        plain[last]["content"] = MARKER + plain[last]["content"]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    context, _, query = text.partition(MARKER)
    # The template has the special tokens that the model wants.
    return tuple(tokenizer.encode(part, add_special_tokens=False) for part in (context, query))


async def whole(pieces: AsyncIterator[list[int] | StarOutput]) -> StarOutput:
    """The output at the end of a stream."""
    async for piece in pieces:
        if isinstance(piece, StarOutput):
            return piece
    raise StarError("the request ended without an answer.")


async def started(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """The same stream, begun: an error before the first token is an answer of its own."""
    first = await anext(chunks)

    async def rest() -> AsyncIterator[str]:
        yield first
        async for chunk in chunks:
            yield chunk

    return rest()


async def events(
    pieces: AsyncIterator[list[int] | StarOutput], tokenizer: Any, chunk: Any, last: Any = None
) -> AsyncIterator[str]:
    """Server-sent events of a stream: text that is whole so far, the finish reason, what `last` makes of the output,
    and the end.
    """
    tokens: list[int] = []
    sent, is_first = "", True
    try:
        async for piece in pieces:
            finish_reason = None
            if isinstance(piece, StarOutput):
                text, finish_reason = piece.text, piece.finish_reason
            else:
                tokens += piece
                text = text_behind_a_token(tokenizer, tokens) if tokenizer is not None else ""
                if text.endswith("\ufffd") or not text.startswith(sent):
                    continue  # a character whose bytes are not all there
            if text != sent or finish_reason is not None:
                new = text[len(sent) :] if text.startswith(sent) else ""
                yield f"data: {chunk(new, finish_reason, is_first).model_dump_json(exclude_none=True)}\n\n"
                sent, is_first = text, False
            if last is not None and isinstance(piece, StarOutput):
                yield f"data: {last(piece).model_dump_json(exclude_none=True)}\n\n"
    except StarError as error:
        if is_first:
            raise
        yield f"data: {dumps(problem(str(error), 'ServiceUnavailableError', 503))}\n\n"
    yield "data: [DONE]\n\n"


def text_behind_a_token(tokenizer: Any, tokens: list[int]) -> str:
    """What follows the prompt: some tokenizers drop the space in front of a text's first word."""
    first = tokenizer.decode(tokens[:1], skip_special_tokens=True)
    text: str = tokenizer.decode(tokens[:1] + tokens, skip_special_tokens=True)
    return text[len(first) :]


def usage(protocol: Any, output: StarOutput) -> Any:
    """Tokens of prompt and answer."""
    new = len(output.token_ids)
    prompt = output.num_prompt_tokens
    return protocol.UsageInfo(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


def problem(message: str, kind: str, code: int) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def dumps(value: Any) -> str:
    import json

    return json.dumps(value)


def serve(llm: StarLLM, model_name: str, host: str, port: int) -> None:
    """Answer until the process is told to end."""
    import uvicorn

    uvicorn.run(make_app(llm, model_name), host=host, port=port, log_level="info")
