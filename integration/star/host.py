"""One host of Star Attention: an engine in this process, its group with the other hosts, and what it is asked to do.

A Ray actor with several threads: one works, the others answer how far it is.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from farspan.needle import local_name
from farspan.star.protocol import Answer, Ask, HostFacts, HostRates, HostSetup, HostStatus, Phase
from farspan.star.rendezvous import bind_port

# Of requests answered together; graphs of larger batches would only lengthen the start.
ENGINE_DEFAULTS: dict[str, Any] = {"max_num_seqs": 4, "enable_prefix_caching": True}
ENGINE_FIXED: dict[str, Any] = {"attention_backend": "CUSTOM", "distributed_executor_backend": "uni"}
MEASURED_RUNS = 4
"""The first of them opens connections."""


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
        self.listening: socket.socket | None = None
        self.llm: Any = None
        self.phase: Phase | None = None
        self.num_steps = 0
        self.request_id: str | None = None
        self.token_ids: list[int] = []
        self.is_aborted = self.is_lockstep = False

    def listen(self) -> tuple[str, int]:
        """Bind the port where all hosts meet; asked of host 0. Returns its address and the port."""
        import ray

        self.listening = bind_port(ray.util.get_node_ip_address())
        address, port = self.listening.getsockname()[:2]
        return address, port

    def start(self, address: str, port: int) -> HostFacts:
        """Meet the other hosts, then make the engine, so that the group exists before graphs are captured."""
        started = time.monotonic()
        self.rejoin(address, port)
        from farspan.vllm_compat.engine import draw_by_place_in_answer
        from vllm import LLM

        setup = self.setup
        arguments = {**ENGINE_DEFAULTS, **setup.engine, **ENGINE_FIXED}
        star = {"timeout_s": setup.timeout_s, "graphs": setup.graphs}
        arguments["additional_config"] = {"farspan": {**setup.options, "star": star}}
        # Each machine unpacks the bundled model.
        self.llm = LLM(local_name(setup.model), **arguments)
        draw_by_place_in_answer(self.llm)
        return self.facts(time.monotonic() - started)

    def rejoin(self, address: str, port: int) -> None:
        """Leave the group and meet the other hosts anew. Raises StarError where one does not come."""
        from farspan.engine_ext.star.exchange import form_exchange, set_exchange

        setup = self.setup
        set_exchange(None)
        if setup.num_hosts == 1:
            return
        exchange = form_exchange(
            setup.rank,
            setup.num_hosts,
            address,
            port,
            listening=self.listening,
            device_type=setup.device_type,
            timeout_s=setup.timeout_s,
            start_timeout_s=setup.start_timeout_s,
        )
        self.listening = None
        exchange.gathers_keys = setup.gathers_keys
        set_exchange(exchange)

    def facts(self, start_s: float) -> HostFacts:
        from farspan.vllm_compat.engine import num_linear_weights

        config = self.llm.llm_engine.vllm_config
        model, cache = config.model_config, config.cache_config
        heads = model.get_num_attention_heads(config.parallel_config)
        layers = model.get_num_layers(config.parallel_config)
        return HostFacts(
            page_size=cache.block_size,
            max_model_len=model.max_model_len,
            cache_len=cache.num_gpu_blocks * cache.block_size,
            vocab_size=model.get_vocab_size(),
            # Two operations a weight and token; four a pair, head and component.
            linear_pairs=num_linear_weights(self.llm) / (2 * layers * heads * model.get_head_size()),
            chunk_len=config.scheduler_config.max_num_batched_tokens,
            start_s=start_s,
        )

    def measure(self) -> HostRates:
        """Time what sending and computing an anchor take; asked of all hosts at the same time."""
        import torch
        from farspan.engine_ext.star.exchange import current
        from farspan.vllm_compat.engine import num_linear_weights

        model = self.llm.llm_engine.vllm_config.model_config
        parallel = self.llm.llm_engine.vllm_config.parallel_config
        device = torch.device(self.setup.device_type)
        exchange = current()
        assert exchange is not None
        heads = model.get_num_kv_heads(parallel) * model.get_num_layers(parallel)
        token_bytes = 2 * heads * model.get_head_size() * model.dtype.itemsize
        num_bytes, side = (64 << 20, 4096) if device.type == "cuda" else (4 << 20, 512)
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        matrix = torch.zeros(side, side, dtype=model.dtype, device=device)
        exchange.agree(b"rates")
        send_s = best_time(lambda: exchange.send_pages(buffer), device)
        compute_s = best_time(lambda: matrix @ matrix, device)
        exchange.take_waited_s()
        return HostRates(send_s / num_bytes * token_bytes, compute_s / side**3 * num_linear_weights(self.llm))

    def run(self, ask: Ask) -> Answer:
        """Do one phase of a request to its end. After an error the engine holds nothing of it any more."""
        from farspan.engine_ext.star.exchange import StarAborted, current

        self.is_aborted, self.token_ids = False, []
        exchange = current()
        if exchange is not None:
            exchange.is_aborted = False
            exchange.anchor_of, exchange.phase = None, ask.phase
            exchange.take_waited_s()
        received = self.num_bytes()
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
            self.is_lockstep = False
        seconds = time.perf_counter() - started
        waited_s = exchange.take_waited_s() if exchange is not None else 0.0
        first, *others = (ends.get(name, RequestEnd()) for name in names)
        return first.answer(
            seconds, self.num_bytes() - received, waited_s, tuple(each.answer(seconds, 0, 0.0) for each in others)
        )

    def prepare(self, ask: Ask) -> None:
        """Agree with all hosts on what phase 1 finds in the prefix caches, where it is not each host's own affair."""
        from farspan.engine_ext.star.exchange import current
        from farspan.engine_ext.star.shard import digest_of_text
        from farspan.vllm_compat.engine import adopt_pages, ignore_cached_pages, num_cached_tokens

        shard, exchange, request_id = ask.shard, current(), self.request_id
        if ask.phase != "phase 1" or shard is None or not (ask.is_lockstep or ask.shares_anchor):
            return
        assert exchange is not None
        assert request_id is not None
        page_size = self.llm.llm_engine.vllm_config.cache_config.block_size
        needed = shard.local_len - page_size if ask.is_lockstep else shard.copied_len
        has_all = num_cached_tokens(self.llm, request_id) >= needed
        if all(exchange.agree(digest_of_text(f"{shard.name} cached"), int(has_all))):
            return
        if ask.is_lockstep:
            # Hosts keep pages for different times; steps are the same only where all of them begin anew.
            ignore_cached_pages(self.llm, request_id)
            return
        adopt_pages(self.llm, request_id, shard.copied_len)
        exchange.anchor_of = shard.name

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
            import torch

            torch.manual_seed(sampling.seed)
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
            for output in engine.step():
                end = ends.setdefault(output.request_id, RequestEnd())
                tokens = output.outputs[0].token_ids
                end.output = output
                end.token_s += [time.perf_counter() - started] * (len(tokens) - len(end.token_s))
                if output.request_id == ask.name:
                    self.token_ids = list(tokens)
            self.num_steps += 1
        return ends

    def status(self) -> HostStatus:
        from farspan.vllm_compat.engine import num_computed_tokens

        phase, request_id = self.phase, self.request_id
        computed = num_computed_tokens(self.llm, request_id) if self.llm is not None and request_id is not None else 0
        return HostStatus(phase, self.num_steps, computed, list(self.token_ids), self.waits_for_all())

    def waits_for_all(self) -> bool:
        """Whether the next step, or one that must come, is one of all hosts."""
        from farspan.engine_ext.star.exchange import current

        exchange = current()
        return self.is_lockstep or (exchange is not None and exchange.anchor_of is not None)

    def abort(self) -> None:
        """End the running request: at its next step, in phase 2 together with the other hosts."""
        from farspan.engine_ext.star.exchange import current

        self.is_aborted = True
        exchange = current()
        if self.is_lockstep and exchange is not None:
            exchange.is_aborted = True

    def num_bytes(self) -> int:
        from farspan.engine_ext.star.exchange import current

        exchange = current()
        return 0 if exchange is None else exchange.num_bytes

    def stop(self) -> None:
        """Leave the group and let go of the engine and its memory."""
        import gc

        from farspan.engine_ext.star.exchange import set_exchange

        set_exchange(None)
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
        gc.collect()


def best_time(work: Callable[[], Any], device: Any) -> float:
    """Seconds of the fastest of a few runs on the device."""
    import torch

    times = []
    for _ in range(MEASURED_RUNS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
