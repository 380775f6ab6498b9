"""One host of Star Attention: an engine in this process, its group with the other hosts, and what it is asked to do.

A Ray actor with several threads: one works, the others answer how far it is.
"""

import contextlib
import os
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from farspan.engine_ext.errors import StarError
from farspan.needle import local_name
from farspan.star import ranks
from farspan.star.protocol import Answer, Ask, HostFacts, HostRates, HostSetup, HostStatus, Phase
from farspan.star.rendezvous import bind_port

# Of requests answered together; graphs of larger batches would only lengthen the start.
ENGINE_DEFAULTS: dict[str, Any] = {"max_num_seqs": 4, "enable_prefix_caching": True}
ENGINE_FIXED: dict[str, Any] = {"attention_backend": "CUSTOM", "distributed_executor_backend": "uni"}
# A step that all hosts end must be the last one that any of a host's processes has begun.
SEVERAL_RANKS: dict[str, Any] = {"async_scheduling": False}


@dataclass
class RequestEnd:
    """What came of one request."""

    output: Any = None
    token_s: list[float] = field(default_factory=list)

    def answer(self, seconds: float, num_bytes: int, key_exchange_s: float, others: tuple[Answer, ...] = ()) -> Answer:
        """With what is told of all requests together."""
        cached = self.output.num_cached_tokens or 0 if self.output is not None else 0
        return Answer(self.output, seconds, self.token_s, cached, num_bytes, key_exchange_s, others)


class StarHost:
    """A host; its methods are called from several threads, `start`, `rejoin` and `run` one at a time."""

    def __init__(self, setup: HostSetup) -> None:
        self.setup = setup
        self.ranks = ranks.Ranks(setup)
        self.listening: socket.socket | None = None
        self.store: Any = None
        """Where the first host tells the others its ranks' ports."""
        self.llm: Any = None
        self.phase: Phase | None = None
        self.num_steps = 0
        self.request_id: str | None = None
        self.token_ids: list[int] = []
        self.is_aborted = self.is_lockstep = self.expects_anchor = False

    def listen(self) -> tuple[str, int]:
        """Bind the port where all hosts meet; asked of host 0. Returns its address and the port."""
        import ray

        self.listening = bind_port(ray.util.get_node_ip_address())
        address, port = self.listening.getsockname()[:2]
        return address, port

    def start(self, address: str, port: int) -> HostFacts:
        """Meet the other hosts, then make the engine, so that the group exists before graphs are captured."""
        from farspan.vllm_compat.engine import draw_by_place_in_answer

        started = time.monotonic()
        setup = self.setup
        arguments = {**ENGINE_DEFAULTS, **setup.engine, **ENGINE_FIXED}
        if "kv_cache_memory_bytes" in arguments:
            # The CPU platform takes the variable before the argument.
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        star = {"timeout_s": setup.timeout_s, "graphs": setup.graphs}
        arguments["additional_config"] = {"farspan": {**setup.options, "star": star}}
        self.llm = self.make_engine(arguments, address, port)
        draw_by_place_in_answer(self.llm)
        return self.facts(time.monotonic() - started)

    def make_engine(self, arguments: dict[str, Any], address: str, port: int) -> Any:
        """The engine, whose processes meet the other hosts' before they capture graphs."""
        from vllm import LLM

        # Each machine unpacks the bundled model.
        model = local_name(self.setup.model)
        if self.setup.num_ranks == 1:
            self.rejoin(address, port)
            return LLM(model, **arguments)
        from farspan.vllm_compat.host_executor import preparing

        def meet(executor: Any) -> None:
            self.ranks.executor = executor
            self.rejoin(address, port)

        with preparing(meet) as executor_class:
            return LLM(model, **{**arguments, **SEVERAL_RANKS, "distributed_executor_backend": executor_class})

    def rejoin(self, address: str, port: int) -> None:
        """Leave the group and meet the other hosts anew. Raises StarError where one does not come, or a rank of this
        host does not answer.
        """
        self.ranks.ask(ranks.leave)
        if self.setup.num_hosts == 1:
            return
        if self.setup.num_ranks == 1:
            ranks.keep(self.listening)
            ports = [port]
        else:
            ports = self.ports_of_ranks(address, port)
        self.listening = None
        self.ranks.meet(address, ports)

    def ports_of_ranks(self, address: str, port: int) -> list[int]:
        """Where each rank meets those of the other hosts: bound by the first host's ranks, told at the port of all."""
        from vllm.distributed.utils import create_tcp_store

        setup = self.setup
        timeout = timedelta(seconds=setup.start_timeout_s)
        try:
            self.store = create_tcp_store(
                address,
                port,
                listen_socket=self.listening,
                world_size=setup.num_hosts,
                is_master=setup.rank == 0,
                timeout=timeout,
                wait_for_workers=False,
            )
            if setup.rank == 0:
                ports = self.ranks.ask(ranks.bind, address)
                self.store.set("ports", " ".join(map(str, ports)))
            return [int(each) for each in self.store.get("ports").decode().split()]
        except (RuntimeError, OSError) as error:
            if isinstance(error, StarError):
                raise
            raise StarError(
                f"host {setup.rank} did not meet all {setup.num_hosts} hosts at {address}:{port} within "
                f"{setup.start_timeout_s:g} s ({error}). See their logs, and whether they reach that address."
            ) from error

    def facts(self, start_s: float) -> HostFacts:
        from farspan.vllm_compat.engine import host_bytes_of, num_linear_weights

        config = self.llm.llm_engine.vllm_config
        model, cache = config.model_config, config.cache_config
        heads = model.get_num_attention_heads(config.parallel_config)
        layers = model.get_num_layers(config.parallel_config)
        return HostFacts(
            page_size=cache.block_size,
            max_model_len=model.max_model_len,
            # Block 0 is no request's.
            cache_len=(cache.num_gpu_blocks - 1) * cache.block_size,
            vocab_size=model.get_vocab_size(),
            # Two operations a weight and token; four a pair, head and component.
            linear_pairs=num_linear_weights(self.llm) / (2 * layers * heads * model.get_head_size()),
            chunk_len=config.scheduler_config.max_num_batched_tokens,
            start_s=start_s,
            host_bytes=host_bytes_of(self.llm),
        )

    def measure(self) -> HostRates:
        """Time what sending and computing an anchor take; asked of all hosts at the same time."""
        from farspan.vllm_compat.engine import num_linear_weights

        config = self.llm.llm_engine.vllm_config
        model, parallel = config.model_config, config.parallel_config
        heads = model.get_num_kv_heads(parallel) * model.get_num_layers(parallel)
        token_bytes = 2 * heads * model.get_head_size() * model.dtype.itemsize
        rates = self.ranks.ask(ranks.measure, model.dtype, timeout_s=self.setup.start_timeout_s)
        send_s, compute_s = (max(each) for each in zip(*rates, strict=True))
        return HostRates(send_s * token_bytes, compute_s * num_linear_weights(self.llm))

    def run(self, ask: Ask) -> Answer:
        """Do one phase of a request to its end. After an error the engine holds nothing of it any more."""
        from farspan.engine_ext.star.team import StarAborted

        self.is_aborted, self.token_ids, self.expects_anchor = False, [], False
        received = sum(self.ranks.ask(ranks.begin, ask.phase, self.patience_s(ask)))
        engine = self.llm.llm_engine
        started = time.perf_counter()
        self.phase, self.is_lockstep = ask.phase, ask.is_lockstep
        asks = [ask, *ask.others]
        names = [each.name for each in asks]
        ends: dict[str, RequestEnd] = {}
        try:
            ids = [
                engine.add_request(each.name, {"prompt_token_ids": each.prompt}, self.sampling_of(each))
                for each in asks
            ]
            self.request_id = ids[0]
            self.prepare(ask)
            ends = self.step_to_end(ask, started)
        except StarAborted:
            engine.abort_request(names)
            if ask.phase == "phase 1":
                engine.reset_prefix_cache()
        except Exception:
            with contextlib.suppress(Exception):
                engine.abort_request(names)
                # Pages count as cached from when they are scheduled; this step's were not computed.
                engine.reset_prefix_cache()
            raise
        finally:
            self.phase = self.request_id = None
            self.is_lockstep = self.expects_anchor = False
        seconds = time.perf_counter() - started
        ends_of_ranks = self.ranks.ask(ranks.end)
        num_bytes, waited_s = sum(each for each, _ in ends_of_ranks), max(each for _, each in ends_of_ranks)
        first, *others = (ends.get(name, RequestEnd()) for name in names)
        return first.answer(
            seconds, num_bytes - received, waited_s, tuple(each.answer(seconds, 0, 0.0) for each in others)
        )

    def patience_s(self, ask: Ask) -> float:
        """How long hosts wait for each other in a request."""
        return self.setup.timeout_s if ask.timeout_s is None else ask.timeout_s

    def prepare(self, ask: Ask) -> None:
        """Agree with all hosts on what phase 1 finds in the prefix caches, where it is not each host's own affair."""
        from farspan.engine_ext.star.shard import digest_of_text
        from farspan.vllm_compat.engine import adopt_pages, ignore_cached_pages, num_cached_tokens

        shard, request_id = ask.shard, self.request_id
        if ask.phase != "phase 1" or shard is None or not (ask.is_lockstep or ask.shares_anchor):
            return
        assert request_id is not None
        page_size = self.llm.llm_engine.vllm_config.cache_config.block_size
        needed = shard.local_len - page_size if ask.is_lockstep else shard.copied_len
        has_all = num_cached_tokens(self.llm, request_id) >= needed
        digest = digest_of_text(f"{shard.name} cached")
        timeout_s = self.patience_s(ask) + ranks.REPLY_S
        if all(self.ranks.ask(ranks.agree, digest, int(has_all), timeout_s=timeout_s)[0]):
            return
        if ask.is_lockstep:
            # Hosts keep pages for different times; steps are the same only where all of them begin anew.
            ignore_cached_pages(self.llm, request_id)
            return
        adopt_pages(self.llm, request_id, shard.copied_len)
        self.ranks.ask(ranks.expect_anchor, shard.name)
        self.expects_anchor = True

    def sampling_of(self, ask: Ask) -> Any:
        """The request's parameters with our option in them."""
        import msgspec
        from farspan.engine_ext.star.shard import NAME
        from vllm.sampling_params import RequestOutputKind

        sampling = ask.sampling.clone()
        # All tokens so far at every step, whatever the front end asks for.
        sampling.output_kind = RequestOutputKind.CUMULATIVE
        if self.setup.device_type == "cpu" and sampling.seed is not None:
            # A request's own generator does not survive a prompt in chunks there (vLLM rewinds it as CUDA's). The
            # process's does as well: one request runs at a time.
            self.ranks.ask(ranks.seed, sampling.seed)
            sampling.seed = None
        if ask.shard is not None:
            sampling.extra_args = {**(sampling.extra_args or {}), NAME: msgspec.to_builtins(ask.shard)}
        return sampling

    def step_to_end(self, ask: Ask, started: float) -> dict[str, "RequestEnd"]:
        """Step the engine until all requests are done, or aborted (none). Hosts of phase 2 end only together."""
        engine = self.llm.llm_engine
        ends: dict[str, RequestEnd] = {}
        while engine.has_unfinished_requests():
            if self.is_aborted and not self.waits_for_all():
                engine.abort_request([ask.name])
                return {}
            if self.is_aborted and self.is_lockstep:
                self.ranks.ask(ranks.abort)
            for output in self.step():
                end = ends.setdefault(output.request_id, RequestEnd())
                tokens = output.outputs[0].token_ids
                end.output = output
                end.token_s += [time.perf_counter() - started] * (len(tokens) - len(end.token_s))
                if output.request_id == ask.name:
                    self.token_ids = list(tokens)
            self.num_steps += 1
        return ends

    def step(self) -> list[Any]:
        """A step of the engine. Raises what a rank in this process would."""
        try:
            outputs: list[Any] = self.llm.llm_engine.step()
            if self.expects_anchor:
                self.expects_anchor = self.ranks.ask(ranks.expects_anchor)[0]
        except Exception as error:
            meaning = self.ranks.error_of_step(error)
            if meaning is error:
                raise
            raise meaning from error
        return outputs

    def status(self) -> HostStatus:
        from farspan.vllm_compat.engine import num_computed_tokens

        phase, request_id = self.phase, self.request_id
        computed = num_computed_tokens(self.llm, request_id) if self.llm is not None and request_id is not None else 0
        return HostStatus(phase, self.num_steps, computed, list(self.token_ids), self.waits_for_all())

    def waits_for_all(self) -> bool:
        """Whether the next step, or one that must come, is one of all hosts."""
        return self.is_lockstep or self.expects_anchor

    def abort(self) -> None:
        """End the running request: at its next step, in phase 2 together with the other hosts."""
        self.is_aborted = True

    def stop(self) -> None:
        """Leave the group and let go of the engine and its memory."""
        import gc

        self.ranks.leave()
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.ranks.executor = None
        gc.collect()
