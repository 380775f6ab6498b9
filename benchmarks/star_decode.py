"""What a token costs on two hosts of Star Attention: decode in graphs at whole depth, against one GPU with as much KV.

An 8B shape with all 32 layers. Both hosts have half of the context, and the other engines a prompt of that half: vLLM's
FlashAttention, and this backend on one GPU, so that what is Star's stands apart from what is the backend's. Hosts tell
what they wait for before their steps, and one short request is profiled: time on the device by kernel. Last, several
requests are decoded together in graphs and held against each of them alone.

With one GPU, a host that is alone in its group: all that Star adds to a token but the other host's part.
"""

import json
import os
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from farspan.engine_ext.star.shard import StarShard
from farspan.star import StarLLM, StarOutput
from farspan.star.protocol import Answer, Ask, HostFacts, HostSetup

from benchmarks.engine import CALIBRATED_8B, TINY_LLAMA, WORKER_ENV, Engine, EngineSpec, Request
from benchmarks.record import BenchmarkError, Recorder, quantile
from benchmarks.star import NUM_HOSTS, QUERY_LEN, BenchHost, Way, ask_star, memory_of, prompt_of, python_path

NAME = "tpot"
OUTPUT_LEN, PROFILED_LEN = 97, 17
GOAL_MS = 0.6
BATCH = 3
TIMEOUT_S = 400
NOTES = "FARSPAN_BENCH_NOTES"
"""Variable with the folder where hosts write what they saw; a host of which the driver asks nothing writes nothing."""
MOST_KERNELS = 14


class TimedHost(BenchHost):
    """A host that notes how long it waited for others before its steps, and profiles answers of PROFILED_LEN tokens."""

    def start(self, address: str, port: int) -> HostFacts:
        """As BenchHost's, with `agree` and the builder timed."""
        from farspan.engine_ext.metadata import FarspanMetadataBuilder
        from farspan.engine_ext.star.exchange import Exchange

        self.spans: dict[str, list[float]] = defaultdict(list)
        self.compiled: list[str] = []
        for owner, name in ((Exchange, "agree"), (FarspanMetadataBuilder, "build_lockstep")):
            setattr(owner, name, self.timed(name, getattr(owner, name)))
        facts = super().start(address, port)
        if self.setup.device_type == "cuda":
            self.note_compilations()
        return facts

    def note_compilations(self) -> None:
        """Note the names of Triton kernels that are compiled from here on, in requests."""
        from triton import knobs

        before = knobs.runtime.jit_post_compile_hook

        def note(**event: Any) -> Any:
            self.compiled.append(str(getattr(event.get("fn"), "name", event.get("repr"))))
            return before(**event) if before is not None else None

        knobs.runtime.jit_post_compile_hook = note

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose seconds are noted under `name`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                self.spans[name].append(time.perf_counter() - started)

        return timed

    def run(self, ask: Ask) -> Answer:
        """As StarHost's; phase 2 writes a file of what it saw."""
        self.spans.clear()
        if ask.phase != "phase 2":
            return super().run(ask)
        kernels: list[str] = []
        started = time.perf_counter()
        if ask.sampling.max_tokens == PROFILED_LEN and self.setup.device_type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                answer = super().run(ask)
                torch.cuda.synchronize()
            found = sorted(profile.key_averages(), key=lambda each: -each.device_time_total)
            kernels = [f"{each.device_time_total:9.0f} us {each.count:5d}  {each.key[:90]}" for each in found]
        else:
            answer = super().run(ask)
        note = {
            "rank": self.setup.rank,
            "tokens": ask.sampling.max_tokens,
            "seconds": time.perf_counter() - started,
            "ms": {name: 1e3 * statistics.median(values) for name, values in self.spans.items()},
            "kernels": kernels[:MOST_KERNELS],
            "compiled": self.compiled,
        }
        path = Path(os.environ[NOTES], f"{time.time_ns()}-{self.setup.rank}.json")
        path.write_text(json.dumps(note))
        return answer


class AloneHost(TimedHost):
    """A host in this process, whose group is itself."""

    def rejoin(self, address: str, port: int) -> None:
        """Form the group, which a single host does without otherwise."""
        from farspan.engine_ext.star.exchange import form_exchange, set_exchange
        from farspan.star.rendezvous import bind_port

        listening = bind_port("127.0.0.1")
        own = listening.getsockname()[1]
        setup = self.setup
        set_exchange(
            form_exchange(
                0, 1, "127.0.0.1", own, listening=listening, device_type=setup.device_type, timeout_s=setup.timeout_s,
                start_timeout_s=setup.start_timeout_s,
            )
        )  # fmt: skip


class TimedStar(StarLLM):
    """StarLLM on such hosts."""

    host_class = TimedHost


def cases(dry_run: bool) -> list[int]:
    """Tokens of the contexts, the query included; half of them on each host."""
    return [256] if dry_run else [65536, 131072]


def model_of(dry_run: bool) -> tuple[dict[str, Any], str]:
    """The shape and its label in cases."""
    if dry_run:
        return TINY_LLAMA, "tiny-fp32"
    model = CALIBRATED_8B | {"max_position_embeddings": max(cases(dry_run)) + 4096}
    return model, f"llama8b-l{model['num_hidden_layers']}-bf16"


def engine_of(model: dict[str, Any], longest: int, dry_run: bool) -> dict[str, Any]:
    """Arguments of a host's engine, which decodes in graphs of one to four requests."""
    engine: dict[str, Any] = {"load_format": "seeded_random", "skip_tokenizer_init": True, "seed": 0}
    engine["max_model_len"] = longest
    if dry_run:
        return engine | {"enforce_eager": True, "dtype": "float32", "block_size": 16}
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    return engine | memory_of(model, longest) | {"max_num_batched_tokens": 16384, "compilation_config": graphs}


class Bench:
    """The engines, up at once, and their rows."""

    def __init__(self, recorder: Recorder, stack: ExitStack) -> None:
        """Start all of them together; `stack` ends them."""
        self.recorder, self.dry_run = recorder, recorder.dry_run
        self.model, self.label = model_of(self.dry_run)
        deadline = time.monotonic() + TIMEOUT_S
        self.engines = {
            "fa3": stack.enter_context(Engine(self.spec(None if self.dry_run else "FLASH_ATTN", "0"), deadline)),
            "farspan": stack.enter_context(Engine(self.spec("CUSTOM", "1"), deadline)),
        }
        self.notes = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.star = stack.enter_context(self.start_star(stack))
        for engine in self.engines.values():
            engine.receive()

    def spec(self, backend: str | None, gpu: str) -> EngineSpec:
        """One engine for half of each context, on a GPU of its own."""
        requests = [Request(each // NUM_HOSTS, OUTPUT_LEN) for each in cases(self.dry_run)]
        if self.dry_run:
            return EngineSpec(requests, self.model, backend)
        memory = memory_of(self.model, max(each.prompt_len for each in requests) + 1024)
        return EngineSpec(requests, self.model, backend, engine=memory, environment={"CUDA_VISIBLE_DEVICES": gpu})

    def start_star(self, stack: ExitStack) -> StarLLM:
        """Two hosts that decode in CUDA graphs, of several requests too."""
        engine = engine_of(self.model, max(cases(self.dry_run)) + 1024, self.dry_run)
        environment = {**WORKER_ENV, "PYTHONPATH": python_path(), NOTES: str(self.notes)}
        if self.dry_run:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder, "config.json").write_text(json.dumps(self.model))
        return TimedStar(folder, NUM_HOSTS, timeout_s=60, start_timeout_s=200, graphs=True, env=environment, **engine)

    def measure(self, length: int) -> None:
        """Rows of a token's time."""
        half = length // NUM_HOSTS
        medians = {}
        for name, engine in self.engines.items():
            timing = engine.answer(Request(half, OUTPUT_LEN), 0).timing
            medians[name] = self.add(half, name, timing.tpot_ms[1:])
        output = ask_star(self.star, length, Way("n4", 4), seed=length, output_len=OUTPUT_LEN)
        ours = self.add(length, "farspan-star-n4", [each * 1e3 for each in output.times.token_s[1:]])
        self.recorder.note(f"n{length}: first token after {output.times.first_token_s:.2f} s")
        self.tell_notes()
        for name, median in medians.items():
            verdict = "reached" if ours - median <= GOAL_MS else "MISSED"
            self.recorder.note(f"n{length}: {ours - median:.3f} ms a token more than {name}; goal {GOAL_MS} {verdict}")

    def add(self, length: int, variant: str, samples: list[float]) -> float:
        self.recorder.add(NAME, f"n{length}-b1-{self.label}", variant, "time", "ms", samples)
        self.recorder.note(f"n{length} {variant}: " + ", ".join(f"{each:.2f}" for each in sorted(samples)[::8]) + " ms")
        return quantile(samples, 0.5)

    def profile(self) -> None:
        """One short request, whose kernels are counted."""
        ask_star(self.star, cases(self.dry_run)[0], Way("n4", 4), seed=7, output_len=PROFILED_LEN)
        self.tell_notes()

    def tell_notes(self) -> None:
        """Print what hosts wrote since this was last asked."""
        tell(self.recorder, self.notes)

    def together(self) -> None:
        """Several requests in one graph give the tokens of each alone, and what a step of them takes."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=OUTPUT_LEN, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=5)
        length = 256 if self.dry_run else 4096
        vocab = self.star.hosts.facts[0].vocab_size
        prompts = [prompt_of(length + 64 * number, vocab, 50 + number) for number in range(BATCH)]
        pairs: list[Any] = [(prompt[:-32], prompt[-32:]) for prompt in prompts]
        alone = [self.star.generate(context, query, params) for context, query in pairs]
        self.tell_notes()
        outputs = self.star.generate_together(pairs, params)
        self.tell_notes()
        for number, (one, of_all) in enumerate(zip(alone, outputs, strict=True)):
            same = same_start(one, of_all)
            self.recorder.note(
                f"request {number} of {BATCH} together: {same} of {OUTPUT_LEN} tokens are those of it alone, log "
                f"probabilities up to there within {far(one, of_all, same):.4f}"
            )
        steps = [each * 1e3 for each in outputs[0].times.token_s[1:]]
        self.recorder.note(f"a step of {BATCH} requests: {quantile(steps, 0.5):.3f} ms")


def tell(recorder: Recorder, folder: Path) -> None:
    """Print the notes of hosts in a folder, and remove them."""
    for path in sorted(folder.glob("*.json")):
        note = json.loads(path.read_text())
        path.unlink()
        medians = ", ".join(f"{name} {ms:.3f} ms" for name, ms in note["ms"].items())
        lines = [
            f"host {note['rank']}, {note['tokens']} tokens in {note['seconds']:.3f} s: medians {medians}; compiled in "
            f"requests so far: {note['compiled']}"
        ]
        recorder.note("\n    ".join(lines + note["kernels"]))


def same_start(a: StarOutput, b: StarOutput) -> int:
    pairs = zip(a.token_ids, b.token_ids, strict=True)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(a.token_ids))


def far(a: StarOutput, b: StarOutput, num_tokens: int) -> float:
    """Largest difference of the chosen tokens' log probabilities, over the first tokens."""
    logprobs = [
        [entry[token].logprob for token, entry in zip(each.token_ids, each.output.outputs[0].logprobs, strict=True)]
        for each in (a, b)
    ]
    return max((abs(one - other) for one, other in list(zip(*logprobs, strict=True))[:num_tokens]), default=0.0)


def measure_alone(recorder: Recorder) -> None:
    """A host that is alone, beside engines that are none, on one GPU."""
    from farspan.engine_ext.star.exchange import set_exchange

    started = time.monotonic()
    model, label = model_of(recorder.dry_run)
    length = cases(recorder.dry_run)[0] // NUM_HOSTS
    requests = [Request(length, OUTPUT_LEN)]
    memory = {} if recorder.dry_run else memory_of(model, length + 1024)
    deadline = started + TIMEOUT_S
    backends = {"fa3": None if recorder.dry_run else "FLASH_ATTN", "farspan": "CUSTOM"}
    with ExitStack() as stack:
        specs = {name: EngineSpec(requests, model, backend, engine=memory) for name, backend in backends.items()}
        engines = {name: stack.enter_context(Engine(spec, deadline)) for name, spec in specs.items()}
        os.environ.update(WORKER_ENV)
        os.environ[NOTES] = notes = stack.enter_context(tempfile.TemporaryDirectory())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder, "config.json").write_text(json.dumps(model))
        device: Literal["cpu", "cuda"] = "cpu" if recorder.dry_run else "cuda"
        engine = engine_of(model, length + 1024, recorder.dry_run)
        host = AloneHost(HostSetup(0, 1, folder, device, 60.0, 200.0, True, False, {}, engine))
        stack.callback(set_exchange, None)
        facts = host.start("", 0)
        for each in engines.values():
            each.receive()
        recorder.note(f"all engines up after {time.monotonic() - started:.0f} s")
        found = {}
        for output_len in (4, OUTPUT_LEN, PROFILED_LEN):
            found[output_len] = host.run(ask_alone(facts, length, output_len)).token_s
        for name, each in engines.items():
            found_ms = each.answer(requests[0], 0).timing.tpot_ms[1:]
            recorder.add(NAME, f"n{length}-b1-{label}", name, "time", "ms", found_ms)
        ours = [1e3 * (late - early) for early, late in pairwise(found[OUTPUT_LEN])][1:]
        recorder.add(NAME, f"n{length}-b1-{label}", "farspan-star-alone", "time", "ms", ours)
        tell(recorder, Path(notes))


def ask_alone(facts: HostFacts, length: int, output_len: int) -> Ask:
    """A request of `length` tokens to a host that has all of the context."""
    from vllm import SamplingParams

    name = f"alone-{output_len}"
    context_len = (length - QUERY_LEN) // facts.page_size * facts.page_size
    shard = StarShard(
        name=name, context_len=context_len, num_hosts=1, query_host=0, rank=0, block_len=context_len, anchor_len=0,
        first_block=0, num_blocks=1,
    )  # fmt: skip
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
    return Ask(name, "phase 2", prompt_of(length, facts.vocab_size, output_len), params, shard)


def run(recorder: Recorder) -> None:
    if not recorder.dry_run and torch.cuda.device_count() < NUM_HOSTS:
        measure_alone(recorder)
        return
    started = time.monotonic()
    failed = []
    with ExitStack() as stack:
        bench = Bench(recorder, stack)
        recorder.note(f"all engines up after {time.monotonic() - started:.0f} s")
        # Fills what is allocated at first use.
        ask_star(bench.star, max(cases(recorder.dry_run)[0] // 8, 4 * QUERY_LEN), Way("n4", 4), seed=1, output_len=4)
        bench.tell_notes()
        first, *others = cases(recorder.dry_run)
        work: list[tuple[str, Callable[[], None]]] = [
            (f"n{first}", lambda: bench.measure(first)),
            ("profile", bench.profile),
            ("together", bench.together),
            *((f"n{each}", lambda each=each: bench.measure(each)) for each in others),
        ]
        for name, do in work:
            try:
                do()
            except Exception as error:
                failed.append(name)
                recorder.note(f"{name} failed: {error}\n{traceback.format_exc()}")
            recorder.note(f"{name} done after {time.monotonic() - started:.0f} s")
    if failed:
        raise BenchmarkError(f"failed: {', '.join(failed)}")
