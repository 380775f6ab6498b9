"""`StarLLM`: like vLLM's `LLM`, with the context of one prompt spread over several hosts."""

import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from farspan.engine_ext.config import parse_config
from farspan.engine_ext.errors import ConfigError, StarError
from farspan.engine_ext.star.shard import Shard, StarShard
from farspan.engine_ext.star.windows import WindowShard
from farspan.star.arguments import check_engine_arguments, check_tokens, checked_params, load_tokenizer, sampling_params
from farspan.star.blocks import (
    Anchor,
    BlockSizes,
    Visibility,
    plan_shards,
    shards_of_one,
    sharing_pays,
    window_shards,
    windowed_len,
)
from farspan.star.coordinator import HostLost, Hosts, HostsSetup
from farspan.star.host import StarHost
from farspan.star.output import Progress, StarOutput, StarTimes
from farspan.star.protocol import Answer, Ask, HostStatus, Phase

MARKER = "<|query|>"
"""Splits a prompt given in one piece into context and query; it is not part of either."""
WARM_UP_PAGES = 2
"""Of context for each host, in the request that every start ends with."""
SMALLEST_PAGE = 16

Tokens = str | Sequence[int]


class StarLLM:
    """A model whose long prompts are read by several hosts at once, each with a GPU (or a share of this CPU).

    A context is cut into blocks; every block sees the anchor, which is the first block or its start, and itself. The
    query and all new tokens see the whole context. One host, or a context shorter than a block, is exact attention.
    Requests are done one at a time: those of several threads wait for each other, and all hosts have them in one order.
    """

    host_class: type[StarHost] = StarHost
    """Of the actors; a subclass of both can prepare the hosts' processes."""

    def __init__(
        self,
        model: str,
        hosts: int = 1,
        *,
        block_len: int | None = None,
        anchor_len: int | None = None,
        anchor: Anchor = "recompute",
        visibility: Visibility = "star",
        timeout_s: float = 60.0,
        start_timeout_s: float = 900.0,
        graphs: bool = False,
        address: str | None = None,
        strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK",
        env: dict[str, str] | None = None,
        options: dict[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        """Start all hosts; returns when a first request went through them.

        block_len, anchor_len: tokens, multiples of the page size; by default a quarter of the context or a host's even
            share, whichever is smaller, and a whole block.
        anchor: "recompute": each host computes the anchor that it sees; "share": host 0 sends its keys and values layer
            by layer; "auto": what is faster by a measurement at the start.
        visibility: "star", or "all": every token sees all before it, exact attention over all hosts; there are no
            blocks then, and hosts exchange keys in every layer.
        timeout_s: how long a host may make no progress, and the others wait for it, before an error names it.
        start_timeout_s: for placing the hosts, loading the model and the first request.
        graphs: decode in CUDA graphs that hold the exchange. Short prompts then go through all hosts too, and a lost
            host restarts all of them.
        address: of a Ray cluster; by default the one of RAY_ADDRESS, or a new one on this machine.
        strategy: how Ray places hosts over machines. env: environment variables of the hosts.
        options: farspan's, as under `additional_config["farspan"]`; `string` is refused.
        engine: further arguments of vLLM's `LLM`, for every host; `max_model_len` holds for a host's share.
        Raises ConfigError, UnsupportedModelError, UnsupportedEngineError or StarError.
        """
        if isinstance(hosts, bool) or not isinstance(hosts, int) or hosts < 1:
            raise ConfigError(f"hosts={hosts!r}; allowed: a whole number from 1. Use one for each GPU.")
        check_engine_arguments(engine)
        parse_config({**(options or {}), "star": {"timeout_s": timeout_s}})
        self.sizes = BlockSizes().changed(block_len, anchor_len, None if anchor == "recompute" else anchor, visibility)
        # Again with the engine's own page size once it is known.
        self.sizes.check(engine.get("block_size") or SMALLEST_PAGE)
        self.tokenizer: Any = None if engine.get("skip_tokenizer_init") else load_tokenizer(model, engine)
        self.hosts = Hosts(
            HostsSetup(
                num_hosts=hosts,
                model=model,
                timeout_s=timeout_s,
                start_timeout_s=start_timeout_s,
                graphs=graphs and hosts > 1,
                gathers_keys=visibility == "all",
                options=dict(options or {}),
                engine=engine,
                address=address,
                strategy=strategy,
                env=dict(env or {}),
            ),
            self.host_class,
        )
        self.num_hosts = hosts
        self.restart_s = self.phase_1_s = 0.0
        """Of the running request."""
        self.sharing_pays: bool | None = None
        """None until it is measured."""
        self.lock = threading.Lock()
        self.working_thread: int | None = None
        """That began the running request."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start all hosts and send them a short request, which compiles what has to be."""
        self.hosts.start()
        facts = self.hosts.facts
        self.page_size = facts[0].page_size
        self.linear_pairs = facts[0].linear_pairs
        self.sizes.check(self.page_size)
        num_tokens = WARM_UP_PAGES * self.num_hosts * self.page_size
        room = min(each.max_model_len for each in facts)
        if self.num_hosts == 1 or num_tokens // self.num_hosts + 2 * self.page_size > room:
            return
        context = [token % facts[0].vocab_size for token in range(num_tokens)]
        sizes = BlockSizes(self.page_size, None)
        shards = plan_shards(uuid.uuid4().hex, num_tokens, self.num_hosts, self.page_size, sizes, self.linear_pairs)
        assert shards is not None
        params = sampling_params(max_tokens=2, temperature=0.0, ignore_eos=True)
        for _ in self.ask_all(context, [1, 2], params, shards, {}, may_replace=False):
            pass

    def generate(
        self,
        context: Tokens,
        query: Tokens | None = None,
        sampling_params: Any = None,
        *,
        block_len: int | None = None,
        anchor_len: int | None = None,
        anchor: Anchor | None = None,
        visibility: Visibility | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> StarOutput:
        """Answer one query about one context.

        context, query: text or token ids. Without a query the context is a prompt with the marker `<|query|>` between
        the two. sampling_params: vLLM's SamplingParams, n = 1; a seed is drawn where none is given, the same on all
        hosts. block_len, anchor_len, anchor, visibility: for this request, instead of the constructor's. on_progress:
        called while hosts work.
        Raises ConfigError or vLLM's validation errors for a bad request, StarError naming the host and the phase where
        one is lost; the next request then starts the hosts anew.
        """
        sizes = self.sizes.changed(block_len, anchor_len, anchor, visibility)
        result: list[StarOutput] = []
        for progress in self.work(context, query, sampling_params, sizes, result):
            if on_progress is not None:
                on_progress(progress)
        return result[0]

    def stream(
        self, context: Tokens, query: Tokens | None = None, sampling_params: Any = None
    ) -> Generator[list[int], None, StarOutput]:
        """`generate`, yielding new token ids as they come; the generator's return value is the StarOutput.

        Closing it aborts the request on all hosts.
        """
        result: list[StarOutput] = []
        num_seen = 0
        for progress in self.work(context, query, sampling_params, self.sizes, result):
            if len(progress.token_ids) > num_seen:
                yield progress.token_ids[num_seen:]
                num_seen = len(progress.token_ids)
        if len(result[0].token_ids) > num_seen:
            yield result[0].token_ids[num_seen:]
        return result[0]

    def work(
        self,
        context: Tokens,
        query: Tokens | None,
        params: Any,
        sizes: BlockSizes,
        result: list[StarOutput],
    ) -> Iterator[Progress]:
        """One request from its tokens to its output, which is put into `result`; requests of other threads wait.

        Raises StarError where this thread has a stream open, for which it would wait for ever.
        """
        if self.lock.locked() and self.working_thread == threading.get_ident():
            raise StarError(
                "another request of this thread is not at its end; requests are done one at a time. Read its stream to "
                "the end, or close it."
            )
        with self.lock:
            self.working_thread = threading.get_ident()
            try:
                yield from self.work_alone(context, query, params, sizes, result)
            finally:
                self.working_thread = None

    def work_alone(
        self,
        context: Tokens,
        query: Tokens | None,
        params: Any,
        sizes: BlockSizes,
        result: list[StarOutput],
    ) -> Iterator[Progress]:
        """`work`, while no other request is."""
        context_ids, query_ids = self.tokens_of(context, query)
        params = checked_params(params)
        started = time.perf_counter()
        self.restart_s = 0.0
        if not self.hosts.actors:
            self.start()
            self.restart_s = time.perf_counter() - started
        sizes.check(self.page_size)
        facts = self.hosts.facts
        check_tokens(context_ids + query_ids, facts[0].vocab_size)
        num_context = len(context_ids) // self.page_size * self.page_size
        if num_context == len(context_ids) and not query_ids:
            num_context -= self.page_size
        if sizes.visibility == "all" and self.num_hosts > 1:
            num_context = windowed_len(num_context, self.num_hosts, self.page_size, self.chunk_len())
        # What is left of a page is read with the query: it sees all of the context, and costs no more.
        query_ids = context_ids[num_context:] + query_ids
        context_ids = context_ids[:num_context]
        name = uuid.uuid4().hex
        shards = self.plan(name, context_ids, sizes) if num_context > 0 else None
        if shards is None and self.hosts.setup.graphs:
            shards = shards_of_one(name, num_context, self.num_hosts, self.page_size)
        if params.max_tokens is None:
            # Hosts have room for different numbers of tokens, and must end together.
            params.max_tokens = max(self.room(shards, len(context_ids), len(query_ids)), 1)
        self.check_room(shards, len(context_ids), len(query_ids), params.max_tokens)
        collected: dict[str, dict[int, Answer]] = {}
        if shards is None:
            yield from self.ask_one(name, context_ids + query_ids, params, collected)
        else:
            shares = len(shards) > 1 and sizes.visibility == "star" and self.shares(shards, sizes.anchor)
            yield from self.ask_all(context_ids, query_ids, params, shards, collected, shares_anchor=shares)
        total_s = time.perf_counter() - started
        num_prompt_tokens = len(context_ids) + len(query_ids)
        result.append(replace(self.make_output(collected, shards, total_s), num_prompt_tokens=num_prompt_tokens))

    def plan(self, name: str, context: list[int], sizes: BlockSizes) -> Sequence[Shard] | None:
        """Who reads what of a context of whole pages; None where one host does the same."""
        if sizes.visibility == "all":
            if self.num_hosts == 1:
                return None
            return window_shards(name, context, self.num_hosts, self.page_size, self.chunk_len())
        return plan_shards(
            name,
            len(context),
            self.num_hosts,
            self.page_size,
            sizes,
            self.linear_pairs,
            copies_anchor=not self.wants_sharing(sizes.anchor),
        )

    def wants_sharing(self, anchor: Anchor) -> bool:
        """Whether host 0 sends the anchor; measured when it is first asked for."""
        if anchor != "auto":
            return anchor == "share"
        if self.sharing_pays is None:
            rates = self.hosts.measure() if self.num_hosts > 1 else []
            slowest = max(rates, key=lambda rate: rate.send_token_s, default=None)
            self.sharing_pays = slowest is not None and sharing_pays(slowest.send_token_s, slowest.compute_token_s)
        return self.sharing_pays

    def shares(self, shards: Sequence[Shard], anchor: Anchor) -> bool:
        """Whether a request's anchor is sent: all hosts take part in that, so all of them need a block."""
        copied = [shard.copied_len for shard in shards if shard.num_blocks > 0]
        return len(copied) == self.num_hosts and any(copied) and self.wants_sharing(anchor)

    def chunk_len(self) -> int:
        """Tokens of a step of every host. Raises ConfigError where hosts differ."""
        lens = {facts.chunk_len for facts in self.hosts.facts}
        if len(lens) > 1:
            raise ConfigError(
                f"visibility='all' on hosts whose steps have {sorted(lens)} tokens; allowed: the same on all. Set "
                "max_num_batched_tokens."
            )
        return lens.pop()

    def ask_one(
        self, name: str, prompt: list[int], params: Any, collected: dict[str, dict[int, Answer]]
    ) -> Iterator[Progress]:
        """Exact attention on host 0, as a plain request of its engine."""
        answers: dict[int, Answer] = {}
        ask = Ask(name, "exact attention", prompt, params, None)
        for statuses in self.guarded({0: ask}, answers):
            yield Progress("exact attention", 0, 0, tokens_of_status(statuses.get(0)))
        collected["phase 2"] = answers

    def ask_all(
        self,
        context: list[int],
        query: list[int],
        params: Any,
        shards: Sequence[Shard],
        collected: dict[str, dict[int, Answer]],
        may_replace: bool = True,
        shares_anchor: bool = False,
    ) -> Iterator[Progress]:
        """Both phases on all hosts. A host that is lost in phase 1 is replaced once, where it may be."""
        parts = [host_context(context, shard) for shard in shards]
        num_blocks = sum(shard.num_blocks for shard in shards)
        # With the request's own options: phase 2 finds the pages of phase 1 by them.
        first_params = sampling_params(max_tokens=1, temperature=0.0, ignore_eos=True, extra_args=params.extra_args)

        def ask(shard: Shard, phase: Phase, attempt: int = 0) -> Ask:
            is_first = phase == "phase 1"
            prompt = parts[shard.rank] if is_first else parts[shard.rank] + query
            # Names of requests are used once in an engine. A second attempt needs no other host's anchor.
            name = f"{shard.name}-{phase[-1]}-{attempt}"
            shares = is_first and shares_anchor and attempt == 0
            return Ask(name, phase, prompt, first_params if is_first else params, shard, shares)

        answers: dict[int, Answer] = {}
        first = {shard.rank: ask(shard, "phase 1") for shard in shards if shard.num_blocks > 0}
        is_lockstep = isinstance(shards[0], WindowShard)
        todo = first
        started = time.perf_counter()
        for attempt in range(2):
            try:
                for statuses in self.guarded(todo, answers, may_replace and attempt == 0):
                    done = sum(blocks_done(shards[rank], status) for rank, status in statuses.items())
                    done += sum(shards[rank].num_blocks for rank in answers)
                    yield Progress("phase 1", min(done, num_blocks), num_blocks, [])
                break
            except HostLost as lost:
                restarted = time.perf_counter()
                try:
                    if self.hosts.setup.graphs:
                        # A new host captures graphs with the others, which must do so at the same time.
                        self.hosts.stop()
                        self.start()
                        answers.clear()
                    else:
                        self.hosts.replace(lost.rank)
                except Exception as error:
                    self.hosts.stop()
                    raise StarError(f"{lost} A replacement did not start either: {error}") from error
                self.restart_s += time.perf_counter() - restarted
                # Only what is not answered is asked again; a new host starts with an empty cache.
                answers.pop(lost.rank, None)
                if is_lockstep:
                    answers.clear()
                todo = {rank: ask(shards[rank], "phase 1", 1) for rank in first if rank not in answers}
        collected["phase 1"] = answers
        yield Progress("phase 1", num_blocks, num_blocks, [])
        self.phase_1_s = time.perf_counter() - started
        second: dict[int, Answer] = {}
        query_host = shards[0].query_host
        for statuses in self.guarded({shard.rank: ask(shard, "phase 2") for shard in shards}, second):
            yield Progress("phase 2", num_blocks, num_blocks, tokens_of_status(statuses.get(query_host)))
        collected["phase 2"] = second
        self.check_same_tokens(second, shards)

    def guarded(
        self, asks: dict[int, Ask], answers: dict[int, Answer], may_replace: bool = False
    ) -> Iterator[dict[int, HostStatus]]:
        """`Hosts.run`; after an error that leaves hosts in doubt all of them are stopped, to start anew when needed."""
        try:
            yield from self.hosts.run(asks, answers)
        except HostLost as error:
            if may_replace:
                raise
            self.hosts.stop()
            raise StarError(str(error)) from error
        except StarError:
            self.hosts.stop()
            raise

    def check_same_tokens(self, answers: dict[int, Answer], shards: Sequence[Shard]) -> None:
        """The query host's tokens count. Raises StarError naming the hosts that have others."""
        query_host = shards[0].query_host
        tokens = {rank: list(answer.output.outputs[0].token_ids) for rank, answer in answers.items()}
        differing = [rank for rank in sorted(tokens) if tokens[rank] != tokens[query_host]]
        if differing:
            self.hosts.stop()
            raise StarError(
                f"phase 2: host{'s' if len(differing) > 1 else ''} {', '.join(map(str, differing))} and the query's "
                f"host {query_host} chose different tokens, so their memory or their software differs. Check that all "
                "machines have the same GPUs and the same versions."
            )

    def room(self, shards: Sequence[Shard] | None, context_len: int, query_len: int) -> int:
        """New tokens for which the fullest host has room."""
        needs = [context_len] if shards is None else [shard.local_len for shard in shards]
        rooms = (min(facts.max_model_len, facts.cache_len) for facts in self.hosts.facts)
        return min(room - need - query_len for need, room in zip(needs, rooms, strict=False))

    def check_room(self, shards: Sequence[Shard] | None, context_len: int, query_len: int, max_tokens: int) -> None:
        """Raise ConfigError unless every host's share, the query and the answer fit into its engine."""
        needs = [context_len] if shards is None else [shard.local_len for shard in shards]
        for rank, (need, facts) in enumerate(zip(needs, self.hosts.facts, strict=False)):
            total = need + query_len + max_tokens
            room = min(facts.max_model_len, facts.cache_len)
            if total > room:
                limit = "max_model_len" if facts.max_model_len <= facts.cache_len else "tokens of KV cache"
                raise ConfigError(
                    f"host {rank} needs {total} tokens: {need} of the context ({context_len} in all), {query_len} of "
                    f"the query and {max_tokens} new ones; it has {room} ({limit}). Use more hosts, a larger "
                    "max_model_len or gpu_memory_utilization, or smaller blocks and a smaller anchor."
                )

    def tokens_of(self, context: Tokens, query: Tokens | None) -> tuple[list[int], list[int]]:
        """Token ids of context and query; special tokens stand at the start of the context alone."""
        if query is None and isinstance(context, str):
            before, marker, after = context.partition(MARKER)
            if not marker:
                raise ConfigError(
                    f"a prompt without {MARKER!r}; allowed: context and query apart, or in one text with {MARKER!r} "
                    "between them. Pass the query as the second argument."
                )
            context, query = before, after
        if isinstance(context, str) or isinstance(query, str):
            if self.tokenizer is None:
                raise ConfigError("text with skip_tokenizer_init; allowed: token ids. Pass lists of ints.")
            if isinstance(context, str):
                context = self.tokenizer.encode(context)
            if isinstance(query, str):
                query = self.tokenizer.encode(query, add_special_tokens=False)
        context_ids: list[int] = list(context)  # type: ignore[arg-type]
        query_ids: list[int] = list(query or [])  # type: ignore[arg-type]
        if not context_ids and not query_ids:
            raise ConfigError("an empty context and an empty query; allowed: at least one token. Give a prompt.")
        return context_ids, query_ids

    def make_output(
        self, collected: dict[str, dict[int, Answer]], shards: Sequence[Shard] | None, total_s: float
    ) -> StarOutput:
        query_host = 0 if shards is None else shards[0].query_host
        answer = collected["phase 2"][query_host]
        first = collected.get("phase 1", {})
        phase_1_s = self.phase_1_s if shards is not None else 0.0
        completion = answer.output.outputs[0]
        times = StarTimes(
            phase_1_s=phase_1_s,
            first_token_s=phase_1_s + answer.token_s[0],
            total_s=total_s,
            token_s=[late - early for early, late in zip(answer.token_s, answer.token_s[1:], strict=False)],
            exchanged_bytes=sum(each.num_bytes for answers in collected.values() for each in answers.values()),
            key_exchange_s=[first[rank].key_exchange_s if rank in first else 0.0 for rank in range(self.num_hosts)],
            host_s=[first[rank].seconds if rank in first else 0.0 for rank in range(self.num_hosts)],
            restart_s=self.restart_s,
        )
        return StarOutput(
            token_ids=list(completion.token_ids),
            text=completion.text,
            finish_reason=completion.finish_reason,
            output=answer.output,
            shards=None if shards is None else list(shards),
            times=times,
        )

    def close(self) -> None:
        """End all hosts, free their memory, and stop Ray if it was started here. Calling it again changes nothing."""
        self.hosts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def host_context(context: list[int], shard: Shard) -> list[int]:
    """What a host reads of the context: a copy of the anchor, if it has one, and its blocks."""
    return context[: shard.copied_len] + [token for start, stop in shard.stretches() for token in context[start:stop]]


def blocks_done(shard: Shard, status: HostStatus) -> int:
    """Own blocks that a host in phase 1 has read."""
    if status.phase != "phase 1":
        return 0
    own = max(status.num_computed_tokens - shard.copied_len, 0)
    if own >= shard.own_len:
        return shard.num_blocks
    return own // shard.block_len if isinstance(shard, StarShard) else own * shard.num_blocks // shard.own_len


def tokens_of_status(status: HostStatus | None) -> list[int]:
    return status.token_ids if status is not None else []
