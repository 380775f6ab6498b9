"""The OpenAI-like server around a StarLLM that answers from a list: forms, streaming, errors; no engine."""

import json
from collections.abc import Generator
from typing import Any

import pytest
from farspan.engine_ext.errors import ConfigError, StarError
from farspan.star.arguments import MARKER
from farspan.star.output import StarOutput
from farspan.star.serve import Queue, make_app

from tests.integration.star.test_command import TIMES

pytestmark = pytest.mark.filterwarnings("default")

WORDS = {7: "sieben", 8: "acht", 9: "neun"}


class Tokenizer:
    """Words apart by spaces; a text is its words' lengths."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        """Words of the tokens."""
        return " ".join(WORDS[token] for token in tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A token a word."""
        return [len(word) for word in text.split()]

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        """Role and content, one behind the other."""
        return " ".join(f"{message['role']} {message['content']}" for message in messages)


class Llm:
    """What the server needs of a StarLLM."""

    tokenizer = Tokenizer()

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any, Any]] = []
        self.error: Exception | None = None
        self.num_closed = 0

    def stream(self, context: Any, query: Any, params: Any) -> Generator[list[int], None, StarOutput]:
        """Three tokens, in two pieces."""
        self.asked.append((context, query, params))
        if self.error is not None:
            raise self.error
        try:
            yield [7]
            yield [8, 9]
        except GeneratorExit:
            self.num_closed += 1
            raise
        return StarOutput([7, 8, 9], " sieben acht neun", "stop", None, None, TIMES, 5)


@pytest.fixture
def llm() -> Llm:
    return Llm()


@pytest.fixture
def client(llm: Llm) -> Any:
    from starlette.testclient import TestClient

    return TestClient(make_app(llm, "m"), raise_server_exceptions=False)


def test_completions(client: Any, llm: Llm) -> None:
    answer = client.post("/v1/completions", json={"model": "m", "prompt": f"a{MARKER}b", "max_tokens": 3}).json()
    assert answer["choices"][0]["text"] == " sieben acht neun"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 3
    context, query, params = llm.asked[0]
    assert (context, query, params.max_tokens) == (f"a{MARKER}b", None, 3)
    assert client.get("/v1/models").json()["data"][0]["id"] == "m"
    assert client.get("/health").status_code == 200


def test_a_scrape_tells_where_the_time_went(client: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    for stream in (False, True):
        client.post("/v1/completions", json={"model": "m", "prompt": "a", "stream": stream})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        sample.name.removeprefix("farspan_star_"): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["phase_1_seconds_count"] == found["first_token_seconds_count"] == 2
    assert found["phase_1_seconds_sum"] == 2 * TIMES.phase_1_s
    assert found["token_seconds_count"] == 2 * len(TIMES.token_s)
    assert found["token_seconds_sum"] == pytest.approx(2 * sum(TIMES.token_s))
    assert found["exchanged_bytes_total"] == 2 * TIMES.exchanged_bytes
    assert found["restart_seconds_count"] == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_are_pieces_of_the_text(client: Any, path: str) -> None:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    with client.stream("POST", path, json={"model": "m", "stream": True, **asked}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    texts = [each.get("text", each.get("delta", {}).get("content")) for each in choices]
    assert texts == [" sieben", " acht neun", ""]
    assert choices[-1]["finish_reason"] == "stop"
    assert len({json.loads(line)["id"] for line in lines[:-1]}) == 1


@pytest.mark.parametrize(
    ("messages", "context", "query"),
    [
        (["aa", "bbb", "c"], [4, 2, 9, 3, 4], [1]),
        (["aa", f"bbb{MARKER}dd", "c"], [4, 2, 9, 3], [2, 4, 1]),
    ],
    ids=["last-message", "marker"],
)
def test_chats_are_cut_before_the_question(
    client: Any, llm: Llm, messages: list[str], context: list[int], query: list[int]
) -> None:
    roles = ["user", "assistant", "user"]
    sent = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=True)]
    answer = client.post("/v1/chat/completions", json={"model": "m", "messages": sent}).json()
    assert answer["choices"][0]["message"]["content"] == " sieben acht neun"
    assert llm.asked[0][:2] == (context, query)
    # Without a limit: what the hosts have room for.
    assert llm.asked[0][2].max_tokens is None


def test_errors_have_openais_form(client: Any, llm: Llm) -> None:
    for stream in (False, True):
        llm.error = ConfigError("no such thing")
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "a", "stream": stream})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no such thing")
        llm.error = StarError("phase 2: host 1 is dead")
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "a", "stream": stream})
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "phase 2: host 1 is dead")
    llm.error = None
    for changes in ({"echo": True}, {"logprobs": 3}, {"prompt": ["a", "b"]}):
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "a", **changes})
        assert answer.status_code == 400
    chat = {"model": "m", "messages": [{"role": "system", "content": "a"}]}
    assert "at least one" in client.post("/v1/chat/completions", json=chat).json()["error"]["message"]
    assert client.post("/v1/completions", json={"model": "m", "prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "changes", "sentence"),
    [
        ("completions", {"use_beam_search": True}, "use_beam_search=True; farspan star does not support it"),
        ("completions", {"cache_salt": "mine"}, "cache_salt='mine'; farspan star"),
        ("completions", {"add_special_tokens": False}, "add_special_tokens=False; farspan star"),
        ("chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs={"),
        ("chat/completions", {"add_generation_prompt": False}, "add_generation_prompt=False; farspan star"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_be_ignored_is_refused(client: Any, path: str, changes: dict[str, Any], sentence: str) -> None:
    asked = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    answer = client.post(f"/v1/{path}", json={"model": "m", **asked, **changes})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(sentence)


def test_another_model_is_not_found(client: Any) -> None:
    answer = client.post("/v1/completions", json={"model": "other", "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
    assert "model='other'; this server has 'm' alone" in answer.json()["error"]["message"]
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_tells_its_usage_where_asked(client: Any, path: str) -> None:
    asked = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    asked |= {"model": "m", "stream": True}
    answer = client.post(path, json={**asked, "stream_options": {"include_usage": True}}).text
    last = json.loads([line.removeprefix("data: ") for line in answer.splitlines() if line][-2])
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (5, 3)
    assert "usage" not in client.post(path, json=asked).text
    every = {"include_usage": True, "continuous_usage_stats": True}
    assert client.post(path, json={**asked, "stream_options": every}).status_code == 400


def test_a_client_that_leaves_aborts_its_request_alone(llm: Llm) -> None:
    """Cancelled while a thread waits for a piece; the next request begins when that one is really over."""
    import asyncio
    import threading

    may_go_on = threading.Event()
    stock = llm.stream

    def slow(*arguments: Any) -> Generator[list[int], None, StarOutput]:
        pieces = stock(*arguments)
        try:
            yield next(pieces)
            may_go_on.wait(20)
            yield next(pieces)
        finally:
            pieces.close()

    async def leave_and_ask_again() -> list[Any]:
        queue = Queue(llm)  # type: ignore[arg-type]

        async def read() -> None:
            async for _ in queue.stream("a", None, None):
                pass

        llm.stream = slow  # type: ignore[method-assign]
        first = asyncio.create_task(read())
        while not llm.asked:
            await asyncio.sleep(0.01)
        llm.stream = stock  # type: ignore[method-assign]
        second = asyncio.create_task(collect(queue))
        first.cancel()
        await asyncio.sleep(0.2)
        assert len(llm.asked) == 1
        may_go_on.set()
        return await second

    async def collect(queue: Queue) -> list[Any]:
        return [piece async for piece in queue.stream("b", None, None)]

    pieces = asyncio.run(leave_and_ask_again())
    assert pieces[:2] == [[7], [8, 9]]
    assert [context for context, *_ in llm.asked] == ["a", "b"]
    assert llm.num_closed == 1
