"""`StarLLM`: like vLLM's `LLM`, with the context of one prompt spread over several hosts."""

import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from farspan.engine_ext.config import parse_config
from farspan.engine_ext.errors import ConfigError, StarError
from farspan.engine_ext.star.shard import Shard
from farspan.engine_ext.star.team import HostMissing
from farspan.engine_ext.star.windows import WindowShard
from farspan.star.arguments import (
    Tokens,
    check_engine_arguments,
    check_tokens,
    checked_params,
    load_tokenizer,
    sampling_params,
    split_prompt,
)
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
from farspan.star.output import Progress, StarOutput
from farspan.star.protocol import Answer, Ask, HostStatus, RanksApart
from farspan.star.room import check_offload, check_room, check_share, room_of
from farspan.star.work import Work, blocks_done, tokens_of_status

WARM_UP_PAGES = 2
"""Of context for each host, in the request that every start ends with."""
SMALLEST_PAGE = 16


class StarLLM:
    """A model whose long prompts are read by several hosts at once, each with a GPU or more (or a share of this CPU).

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
        anchor: Anchor = "auto",
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

        model: a name on the model hub, a folder that every machine has, or "needle", the bundled model.
        block_len, anchor_len: tokens, multiples of the page size; by default a quarter of the context or a host's even
            share, whichever is smaller, and a whole block.
        anchor: "recompute": each host computes the anchor that it sees; "share": host 0 sends its keys and values layer
            by layer; "auto": what is faster by a measurement before the first request that has an anchor.
        visibility: "star", or "all": every token sees all before it, exact attention over all hosts; there are no
            blocks then, and hosts exchange keys in every layer, for which memory is kept. Its requests may say "star".
        timeout_s: how long a host may make no progress, and the others wait for it, before an error names it.
        start_timeout_s: for placing the hosts, loading the model and the first request.
        graphs: decode in CUDA graphs that hold the exchange. Short prompts then go through all hosts too, and a lost
            host restarts all of them.
        address: of a Ray cluster; by default the one of RAY_ADDRESS, or a new one on this machine.
        strategy: how Ray places hosts over machines. env: environment variables of the hosts.
        options: farspan's, as under `additional_config["farspan"]`; `string` is refused. With `offload` each host keeps
            cold KV heads in host memory; anchors are computed anew then, and graphs and visibility "all" are refused.
        engine: further arguments of vLLM's `LLM`, for every host; `max_model_len` holds for a host's share, and
            `tensor_parallel_size` is the number of a host's GPUs.
        Raises ConfigError, UnsupportedModelError, UnsupportedEngineError or StarError.
        """
        if isinstance(hosts, bool) or not isinstance(hosts, int) or hosts < 1:
            raise ConfigError(f"hosts={hosts!r}; allowed: a whole number from 1. Use one for each GPU.")
        check_engine_arguments(engine)
        star = {"timeout_s": timeout_s, "graphs": graphs and hosts > 1}
        self.has_offload = parse_config({**(options or {}), "star": star}).offload is not None
        """Whether the hosts have the option; then no host reads another one's pages."""
        self.sizes = BlockSizes().changed(block_len, anchor_len, None if anchor == "auto" else anchor, visibility)
        if self.has_offload:
            check_offload(self.sizes)
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
        self.restart_s = 0.0
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
        """Start all hosts and send them a short request, which compiles what has to be; all or none is started."""
        self.hosts.start()
        with self.hosts.all_or_none():
            facts = self.hosts.facts[0]
            self.page_size, self.linear_pairs = facts.page_size, facts.linear_pairs
            self.sizes.check(self.page_size)
            self.warm_up()

    def warm_up(self) -> None:
        """The first request of hosts that have just started."""
        facts = self.hosts.facts
        num_tokens = WARM_UP_PAGES * self.num_hosts * self.page_size
        room = min(each.max_model_len for each in facts)
        if self.num_hosts == 1 or num_tokens // self.num_hosts + 2 * self.page_size > room:
            return
        context = [token % facts[0].vocab_size for token in range(num_tokens)]
        sizes = BlockSizes(self.page_size, None)
        name = uuid.uuid4().hex
        shards = plan_shards(name, num_tokens, self.num_hosts, self.page_size, sizes, self.linear_pairs)
        params = sampling_params(max_tokens=2, temperature=0.0, ignore_eos=True)
        work = Work(name, context, [1, 2], params, shards, False)
        timeout_s, start_timeout_s = self.hosts.setup.timeout_s, self.hosts.setup.start_timeout_s
        # Its first steps compile, one host's sooner than another's.
        self.hosts.patience_s = max(timeout_s, start_timeout_s)
        try:
            for phase in (self.read_context(work, may_replace=False), self.answer_together([work])):
                for _ in phase:
                    pass
        finally:
            self.hosts.patience_s = timeout_s

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
        hosts. block_len, anchor_len, anchor, visibility: for this request, instead of the constructor's; "all" only
        where the constructor has it too, which keeps memory for it. on_progress: called while hosts work.
        Raises ConfigError or vLLM's validation errors for a bad request, StarError naming the host and the phase where
        one is lost; the next request then starts the hosts anew.
        """
        sizes = self.sizes.changed(block_len, anchor_len, anchor, visibility)
        if self.has_offload:
            check_offload(sizes)
        if sizes.visibility == "all" and not self.hosts.setup.gathers_keys:
            raise ConfigError(
                "visibility='all' for one request; allowed: where StarLLM has it too, so that hosts keep memory for "
                "all keys of a layer. Make StarLLM with visibility='all', and give requests that want blocks 'star'."
            )
        result: list[StarOutput] = []
        with closing(self.work(context, query, sampling_params, sizes, result)) as work:
            for progress in work:
                if on_progress is not None:
                    on_progress(progress)
        return result[0]

    def generate_together(
        self, prompts: Sequence[tuple[Tokens, Tokens | None]], sampling_params: Any = None
    ) -> list[StarOutput]:
        """Answer several queries at once: their contexts are read one after the other, their answers decoded together.

        prompts: context and query of each, as in `generate`. sampling_params: vLLM's, for all or one of each.
        Raises as `generate` does, for all of them. Times count from the start of the whole.
        """
        params = sampling_params if isinstance(sampling_params, list | tuple) else [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(
                f"{len(params)} sampling_params for {len(prompts)} prompts; allowed: one for all, or one for each."
            )
        if self.has_offload and len(prompts) > 1:
            raise ConfigError(
                f"{len(prompts)} prompts together with offload; allowed: 1, as hosts take their steps together, and "
                "each runs as many requests at once as its own slots allow. Call generate for each."
            )
        with self.alone():
            started = time.perf_counter()
            self.restart_s = 0.0
            works = [
                self.prepare(context, query, each, self.sizes)
                for (context, query), each in zip(prompts, params, strict=True)
            ]
            check_room(works, self.hosts.facts, has_offload=self.has_offload)
            for work in works:
                for _ in self.ask_one(work) if work.shards is None else self.read_context(work):
                    pass
            if self.restart_s > 0:
                # A replacement may have less room than the host had.
                check_room(works, self.hosts.facts, has_offload=self.has_offload)
            together = [work for work in works if work.shards is not None]
            for _ in self.answer_together(together) if together else ():
                pass
            return [work.output(time.perf_counter() - started, self.restart_s, self.num_hosts) for work in works]

    def stream(
        self, context: Tokens, query: Tokens | None = None, sampling_params: Any = None
    ) -> Generator[list[int], None, StarOutput]:
        """`generate`, yielding new token ids as they come; the generator's return value is the StarOutput.

        Closing it aborts the request on all hosts.
        """
        result: list[StarOutput] = []
        num_seen = 0
        # From Python 3.12 on closing a generator that is in a loop alone leaves the loop's own generator open.
        with closing(self.work(context, query, sampling_params, self.sizes, result)) as work:
            for progress in work:
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
    ) -> Generator[Progress, None, None]:
        """One request from its tokens to its output, which is put into `result`."""
        with self.alone():
            yield from self.work_alone(context, query, params, sizes, result)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other request is: those of other threads wait.

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
                yield
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
        started = time.perf_counter()
        self.restart_s = 0.0
        work = self.prepare(context, query, params, sizes)
        check_room([work], self.hosts.facts, has_offload=self.has_offload)
        if work.shards is None:
            yield from self.ask_one(work)
        else:
            yield from self.read_context(work)
            yield from self.answer_together([work])
        result.append(work.output(time.perf_counter() - started, self.restart_s, self.num_hosts))

    def prepare(self, context: Tokens, query: Tokens | None, params: Any, sizes: BlockSizes) -> Work:
        """Check a request and plan who reads what; starts hosts that are gone."""
        context_ids, query_ids = split_prompt(self.tokenizer, context, query)
        params = checked_params(params)
        if not self.hosts.actors:
            started = time.perf_counter()
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
            params.max_tokens = max(room_of(facts, shards, len(context_ids), len(query_ids)), 1)
        shares = shards is not None and sizes.visibility == "star" and self.shares(shards, sizes.anchor)
        return Work(name, context_ids, query_ids, params, shards, shares)

    def plan(self, name: str, context: list[int], sizes: BlockSizes) -> Sequence[Shard] | None:
        """Who reads what of a context of whole pages; None where one host does the same."""
        if sizes.visibility == "all":
            if self.num_hosts == 1:
                return None
            return window_shards(name, context, self.num_hosts, self.page_size, self.chunk_len())
        numbers = len(context), self.num_hosts, self.page_size, sizes, self.linear_pairs
        shards = plan_shards(name, *numbers)
        if shards is None or not self.shares(shards, sizes.anchor):
            return shards
        return plan_shards(name, *numbers, sending_chunk_len=self.hosts.facts[0].chunk_len)

    def wants_sharing(self, anchor: Anchor) -> bool:
        """Whether host 0 sends the anchor; measured before the first request that has the choice."""
        if anchor != "auto" or self.has_offload:
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

    def ask_one(self, work: Work) -> Iterator[Progress]:
        """Exact attention on host 0, as a plain request of its engine."""
        ask = Ask(work.name, "exact attention", work.context + work.query, work.params, None)
        with closing(self.guarded({0: ask}, work.second)) as steps:
            for statuses in steps:
                yield Progress("exact attention", 0, 0, tokens_of_status(statuses.get(0)))

    def read_context(self, work: Work, may_replace: bool = True) -> Iterator[Progress]:
        """Phase 1 on all hosts. One that is lost is replaced once, where it may be; hosts that lost each other meet
        again once.
        """
        assert work.shards is not None
        shards, num_blocks, answers = work.shards, work.num_blocks, work.first
        with_blocks = [shard for shard in shards if shard.num_blocks > 0]
        todo = {shard.rank: work.first_ask(shard, 0) for shard in with_blocks}
        started = time.perf_counter()
        # Without a context, where a step of one token is one of all hosts, there is nothing to read.
        for attempt in range(2 if todo else 0):
            try:
                with closing(self.guarded(todo, answers, may_replace and attempt == 0)) as steps:
                    for statuses in steps:
                        done = sum(blocks_done(shards[rank], status) for rank, status in statuses.items())
                        done += sum(shards[rank].num_blocks for rank in answers)
                        yield Progress("phase 1", min(done, num_blocks), num_blocks, [])
                break
            except (HostLost, HostMissing, RanksApart) as lost:
                lost_rank = lost.rank if isinstance(lost, HostLost) else None
                restarted = time.perf_counter()
                try:
                    if self.hosts.setup.graphs:
                        # A new host captures graphs with the others, which must do so at the same time.
                        self.hosts.stop()
                        self.start()
                        answers.clear()
                    else:
                        self.hosts.replace(lost_rank)
                except Exception as error:
                    second = "The hosts did not meet again" if lost_rank is None else "A replacement did not start"
                    raise StarError(f"{lost} {second} either: {error}") from error
                self.restart_s += time.perf_counter() - restarted
                try:
                    check_share(work, self.hosts.facts, has_offload=self.has_offload)
                except ConfigError as error:
                    raise StarError(f"{lost} Its replacement has less room: {error}") from error
                # Only what is not answered is asked again; a new host starts with an empty cache.
                if lost_rank is None or isinstance(shards[0], WindowShard):
                    answers.clear()
                else:
                    answers.pop(lost_rank, None)
                todo = {shard.rank: work.first_ask(shard, 1) for shard in with_blocks if shard.rank not in answers}
        yield Progress("phase 1", num_blocks, num_blocks, [])
        work.phase_1_s = time.perf_counter() - started

    def answer_together(self, works: Sequence[Work]) -> Iterator[Progress]:
        """Phase 2 of requests whose contexts are read, in the same steps on all hosts."""
        asks = {}
        for rank in range(self.num_hosts):
            first, *others = (work.second_ask(rank) for work in works)
            asks[rank] = replace(first, others=tuple(others))
        answers: dict[int, Answer] = {}
        work = works[0]
        assert work.shards is not None
        with closing(self.guarded(asks, answers)) as steps:
            for statuses in steps:
                tokens = tokens_of_status(statuses.get(work.shards[0].query_host))
                yield Progress("phase 2", work.num_blocks, work.num_blocks, tokens)
        for rank, answer in answers.items():
            for each, own in zip(works, (answer, *answer.others), strict=True):
                each.second[rank] = own
        for each in works:
            assert each.shards is not None
            self.check_same_tokens(each.second, each.shards)

    def guarded(
        self, asks: dict[int, Ask], answers: dict[int, Answer], may_replace: bool = False
    ) -> Generator[dict[int, HostStatus], None, None]:
        """`Hosts.run`; after an error that leaves hosts in doubt all of them are stopped, to start anew when needed."""
        try:
            yield from self.hosts.run(asks, answers)
        except (HostLost, HostMissing, RanksApart) as error:
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

    def close(self) -> None:
        """End all hosts, free their memory, and stop Ray if it was started here. Calling it again changes nothing."""
        self.hosts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
