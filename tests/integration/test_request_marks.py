"""Requests through vLLM's own front door of the core: who shares blocks with whom, and who is refused alone."""

import queue
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext.errors import ConfigError
from farspan.plugin import register

pytestmark = [pytest.mark.filterwarnings("default")]

BLOCK_SIZE = 16
FLEX = {"prefill": {"method": "flex", "gamma": 0.95}}
ENGINES = {
    "flex": FLEX,
    "block_sparse": {"prefill": {"method": "block_sparse"}},
    "string": {"string": {"shift": 0.33}},
    "dense": None,
}
"""By the options of an engine, every override of a request that it accepts, with the options that follow from it."""
EFFECTIVE: dict[str, list[tuple[dict[str, Any] | None, Any]]] = {
    "flex": [
        (None, 0.95),
        ({}, 0.95),
        ({"farspan.gamma": 0.95}, 0.95),
        ({"farspan.method": "flex"}, 0.95),
        ({"farspan.gamma": 0.9}, 0.9),
        ({"farspan.gamma": 1}, 1.0),
        ({"farspan.method": "dense"}, "dense"),
        ({"else": 1}, 0.95),
    ],
    "block_sparse": [
        (None, "block_sparse"),
        ({"farspan.method": "block_sparse"}, "block_sparse"),
        ({"farspan.method": "dense"}, "dense"),
    ],
    "string": [(None, "string"), ({"farspan.method": "dense"}, "string")],
    "dense": [(None, "dense"), ({"farspan.method": "dense"}, "dense")],
}


def make_core(options: Any, backend: str = "CUSTOM") -> Any:
    """What EngineCore.preprocess_add_request needs of a core."""
    from vllm.utils.hashing import sha256
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    register()
    init_none_hash(sha256)
    attention = SimpleNamespace(backend=AttentionBackendEnum[backend], backend_per_kind=None)
    return SimpleNamespace(
        vllm_config=SimpleNamespace(attention_config=attention, additional_config={"farspan": options}),
        mm_receiver_cache=None,
        request_block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        aborts_queue=queue.Queue(),
        input_queue=queue.Queue(),
    )


def add(
    core: Any,
    request_id: str,
    tokens: list[int],
    extra_args: dict[str, Any] | None = None,
    user_salt: str | None = None,
    *,
    resumable: bool = False,
) -> Any:
    """A request as the core makes it from what any front end sends."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core import EngineCore

    sent = EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(tokens),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1, extra_args=extra_args),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=user_salt,
        data_parallel_rank=None,
        resumable=resumable,
    )
    request, _ = EngineCore.preprocess_add_request(core, sent)
    assert sent.cache_salt == user_salt
    return request


class Cache:
    """vLLM's KV cache manager, with a note on every block of what its KV was computed from."""

    def __init__(self) -> None:
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
        config = KVCacheConfig(
            num_blocks=20000, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.manager = KVCacheManager(
            config, max_model_len=4096, scheduler_block_size=BLOCK_SIZE, hash_block_size=BLOCK_SIZE
        )
        self.contents: dict[int, Any] = {}
        self.computed: set[Any] = set()

    def compute(self, request: Any, made_by: Any) -> None:
        """Prefill what is not computed yet; all blocks read must hold KV made alike, and none is missed.

        made_by: what, with the tokens, the KV and the right to read it depend on.
        """
        tokens = tuple(request.all_token_ids)
        wanted = [(made_by, tokens[: end + BLOCK_SIZE]) for end in range(0, len(tokens), BLOCK_SIZE)]
        if request.num_computed_tokens == 0:
            hits, num_hit_tokens, _ = self.manager.get_computed_blocks(request)
            ids = hits.get_block_ids()[0]
            assert [self.contents[each] for each in ids] == wanted[: len(ids)]
            num_shareable = (len(tokens) - 1) // BLOCK_SIZE
            assert len(ids) == sum(each in self.computed for each in wanted[:num_shareable])
        else:
            hits, num_hit_tokens = None, 0
        num_new = len(tokens) - num_hit_tokens - request.num_computed_tokens
        assert self.manager.allocate_slots(request, num_new, num_hit_tokens, hits) is not None
        request.num_computed_tokens = len(tokens)
        full = len(tokens) // BLOCK_SIZE
        ids = self.manager.get_block_ids(request.request_id)[0]
        self.contents.update(zip(ids[:full], wanted[:full], strict=True))
        self.computed.update(wanted[:full])


def continue_session(core: Any, session: Any, chunk: Any) -> None:
    """What vLLM's scheduler does with an accepted chunk of a streaming session."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import StreamingUpdate

    scheduler = SimpleNamespace(hash_block_size=BLOCK_SIZE, num_waiting_for_streaming_input=0, log_stats=False)
    update = StreamingUpdate.from_request(chunk)
    assert update is not None
    # What was sampled last, and is dropped as no step has computed it.
    session.append_output_token_ids(499)
    Scheduler._update_request_as_session(scheduler, session, update)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_no_mix_of_requests_reads_kv_made_otherwise(engine: str, seed: int) -> None:
    generator = random.Random(seed)
    core, cache = make_core(ENGINES[engine]), Cache()
    prompts = [[generator.randrange(500) for _ in range(200)] for _ in range(2)]
    user_salts: list[str | None] = [None, None, "alice", "bob", "alice/bob"]
    for number in range(150):
        extra_args, effective = generator.choice(EFFECTIVE[engine])
        salt = generator.choice(user_salts)
        tokens = generator.choice(prompts)[: generator.randrange(1, 100)]
        resumable = generator.random() < 0.2
        request = add(core, f"r{number}", tokens, extra_args, salt, resumable=resumable)
        cache.compute(request, (effective, salt))
        if request.cache_salt is not None:
            # Forged: what we made for another request, alone and joined with a name.
            user_salts += [request.cache_salt, f"alice/{request.cache_salt}"]
        if resumable:
            next_args, next_effective = generator.choice(EFFECTIVE[engine])
            more = generator.choice(prompts)[: generator.randrange(1, 50)]
            if next_effective == effective:
                chunk = add(core, f"r{number}", more, next_args, salt, resumable=True)
                continue_session(core, request, chunk)
                cache.compute(request, (effective, salt))
            else:
                with pytest.raises(ConfigError, match="later chunk"):
                    add(core, f"r{number}", more, next_args, salt, resumable=True)
        cache.manager.free(request)


def test_a_refused_chunk_ends_its_session_alone() -> None:
    core = make_core(FLEX)
    session = add(core, "s", [1] * 20, {"farspan.gamma": 0.9}, resumable=True)
    with pytest.raises(ConfigError, match="a later chunk of a streaming session has other farspan options"):
        add(core, "s", [2] * 20, resumable=True)
    assert core.aborts_queue.get_nowait() == [session.request_id]
    assert core.input_queue.get_nowait()[1] == [session.request_id]
    # The end of a session has neither tokens nor options of its own.
    add(core, "s", [0], resumable=False)
    del session
    add(core, "s", [2] * 20, resumable=True)


def test_a_session_in_an_engine_of_star_is_refused() -> None:
    core = make_core({"star": {}})
    with pytest.raises(ConfigError, match="a chunk of a streaming session together with star; allowed: whole prompts"):
        add(core, "s", [1] * 20, resumable=True)
    add(core, "s", [1] * 20)


def test_another_users_chunk_is_refused() -> None:
    core = make_core(FLEX)
    session = add(core, "s", [1] * 20, user_salt="alice", resumable=True)
    add(core, session.request_id, [2] * 20, resumable=True)
    with pytest.raises(ConfigError, match="another cache_salt"):
        add(core, session.request_id, [2] * 20, user_salt="bob", resumable=True)


def test_the_core_refuses_what_no_front_end_has_checked() -> None:
    with pytest.raises(ConfigError, match="allowed: a number in"):
        add(make_core(FLEX), "r", [1], {"farspan.gamma": True})


@pytest.mark.parametrize("name", ["farspan.gamma", "farspan_gamma", "Farspan.gamma", "farspan"])
def test_an_engine_without_us_refuses_our_options(name: str) -> None:
    with pytest.raises(ConfigError, match="this engine runs another attention backend"):
        add(make_core(None, "FLASH_ATTN"), "r", [1], {name: 0.9})


def test_an_engine_without_us_keeps_its_salts() -> None:
    assert add(make_core(None, "FLASH_ATTN"), "r", [1], user_salt="alice").cache_salt == "alice"


def test_the_front_end_answers_400(monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.vllm_compat.requests import validating
    from vllm.exceptions import VLLMValidationError

    params = SimpleNamespace(extra_args={"farspan.gamma": 7})
    sent = SimpleNamespace(sampling_params=params, cache_salt=None, resumable=False)
    process_inputs = validating(lambda self: sent)
    with pytest.raises(VLLMValidationError, match=r"farspan\.gamma=7; allowed"):
        process_inputs(make_core(FLEX))


def test_beam_search_refuses_overrides() -> None:
    from farspan.vllm_compat.requests import refusing_overrides
    from vllm.exceptions import VLLMValidationError

    to_beam_search_params = refusing_overrides(lambda self: "params")
    assert to_beam_search_params(SimpleNamespace(vllm_xargs=None, model_extra=None)) == "params"
    with pytest.raises(VLLMValidationError, match="beam search"):
        to_beam_search_params(SimpleNamespace(vllm_xargs={"farspan.gamma": 0.9}, model_extra=None))


@pytest.mark.parametrize("name", ["farspan.gamma", "farspan", "Farspan_method"])
def test_fields_of_the_body_are_refused(name: str) -> None:
    """VLLM takes any field of a request's body, and drops those that it does not know."""
    from farspan.vllm_compat.requests import refusing_fields
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.exceptions import VLLMValidationError

    to_sampling_params = refusing_fields(lambda self: "params")
    message = {"role": "user", "content": "a"}
    for request_cls, asked in (
        (ChatCompletionRequest, {"messages": [message]}),
        (CompletionRequest, {"prompt": "a"}),
        (ResponsesRequest, {"input": "a"}),
    ):
        assert hasattr(request_cls, "to_sampling_params")
        assert to_sampling_params(request_cls(model="tiny", **asked, other_field=1)) == "params"
        with pytest.raises(VLLMValidationError, match="Options of a request are under vllm_xargs"):
            to_sampling_params(request_cls(model="tiny", **asked, **{name: 0.9}))
