"""Star Attention over two GPUs, one long prompt, against one GPU, tensor parallelism 2 and ring attention.

Blocks of N/4 and N/8, dense and with flex inside; the peers are on the same two GPUs.

Whole engines of an 8B shape with fewer layers (`l8` in the case: 8 of 32), calibrated heads, one request alone, a fresh
prompt each time. All engines are up at once and take turns, so that a start is waited for once. Times to the first
token count from the request to the token, both phases included. The ring is `benchmarks.ring`: a whole forward of as
many layers in plain PyTorch with FlashAttention 3, without an engine around it. The hosts read chunks of 32K tokens, so
that an anchor of N/4 of 128K is one; vLLM's own engines have its defaults. First of all, two hosts with blocks of
N/2, which see all of the context, must agree with one GPU on the first token's log probabilities; if not, rows say so.
`--cases` chooses among names of a length and an engine, such as `n524288-b1-llama8b-l8-bf16 farspan-star-n8`; peers
and hosts of which nothing is wanted are not started.
"""

import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from farspan.engine_ext.errors import StarError
from farspan.star import StarLLM, StarOutput
from farspan.star.host import StarHost
from farspan.star.protocol import HostFacts

from benchmarks.engine import (
    CALIBRATED_8B,
    LOGPROB_TOLERANCE,
    TINY_LLAMA,
    WORKER_ENV,
    Engine,
    EngineSpec,
    Request,
    Timing,
)
from benchmarks.record import ROOT, BenchmarkError, Recorder, quantile
from benchmarks.ring import RingHosts, RingSpec

NAME = "star"
CHOOSES_CASES = True
NUM_HOSTS = 2
NUM_LAYERS, ALL_LAYERS = 8, 32
CHUNK_LEN = 32768
GAMMA = 0.9
QUERY_LEN, OUTPUT_LEN = 64, 33
TOP_LOGPROBS = 20
TIMEOUT_S = 540
MOST_ON_ONE_GPU, MOST_CHECKED = 131072, 65536
"""Tokens; one GPU would read 256K in 10 s, 512K in 36 s, and does where `--cases` is given."""
LONGEST = ("n8", "n4", "n8-g0.9", "n8-shared", "n4-shared", "all")
"""Ways of reading what is longer."""


@dataclass(frozen=True)
class Way:
    """One way for the hosts to read a context: in `share` blocks (0 for none), and what else `generate` is told."""

    name: str
    share: int
    method: str = "dense"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        return f"farspan-star-{self.name}"


FLEX = f"-g{GAMMA}"
WAYS = (
    Way("n8", 8),
    Way("n4", 4),
    Way(f"n8{FLEX}", 8, "flex"),
    Way(f"n4{FLEX}", 4, "flex"),
    Way("n8-shared", 8, arguments={"anchor": "share"}),
    Way("n4-shared", 4, arguments={"anchor": "share"}),
    Way("all", 0, arguments={"visibility": "all"}),
    Way(f"all{FLEX}", 0, "flex", {"visibility": "all"}),
)
GOALS = {"n8": 1.55, "n4": 1.25, "n8-shared": 1.8, "all": 1.05, f"n8{FLEX}": 2.0}
"""Times the speed of tensor parallelism 2 at 128K, to the first token."""
GOAL_LEN = 131072
GOAL_TOKEN_MS = 0.6
"""That a token of all layers may take longer than on one GPU with as much KV as each host has."""


@dataclass(frozen=True)
class Case:
    """A prompt of `length` tokens, and how often each engine gets one of that length."""

    length: int
    repeats: int


class BenchHost(StarHost):
    """A host whose engine can load seeded random weights."""

    def start(self, address: str, port: int) -> HostFacts:
        """As StarHost's, with the loader of the benchmarks' engines registered."""
        from benchmarks.engine_worker import register_random_weights

        register_random_weights()
        return super().start(address, port)


class BenchStar(StarLLM):
    """StarLLM on such hosts."""

    host_class = BenchHost


def cases(dry_run: bool) -> list[Case]:
    """List context lengths: a short one, which is checked, then the one of the goals; the longest last."""
    if dry_run:
        return [Case(256, 1), Case(512, 1)]
    return [Case(65536, 1), Case(131072, 1), Case(262144, 1), Case(524288, 1)]


def model_of(dry_run: bool) -> tuple[dict[str, Any], str]:
    """The shape and its label in cases."""
    if dry_run:
        return TINY_LLAMA, "tiny-fp32"
    longest = max(case.length for case in cases(dry_run))
    shape = CALIBRATED_8B | {"num_hidden_layers": NUM_LAYERS, "max_position_embeddings": longest + 4096}
    return shape, f"llama8b-l{NUM_LAYERS}-bf16"


def memory_of(model: dict[str, Any], max_len: int, num_gpus: int = 1) -> dict[str, Any]:
    """Engine arguments for the KV of one request; several engines share a GPU."""
    heads = model["num_hidden_layers"] * model["num_key_value_heads"]
    token_bytes = 2 * 2 * heads * model["head_dim"] // num_gpus
    return {"kv_cache_memory_bytes": int(1.03 * token_bytes * max_len) + 2**28, "gpu_memory_utilization": 0.2}


def prompt_of(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random tokens, in the way of `benchmarks.engine_worker`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def ways(dry_run: bool) -> list[Way]:
    """Those that `generate` of this version knows."""
    known = inspect.signature(StarLLM.generate).parameters
    found = [way for way in WAYS if set(way.arguments) <= set(known)]
    return found[:3] if dry_run else found


def ask_star(llm: StarLLM, num_tokens: int, way: Way, seed: int, output_len: int = OUTPUT_LEN) -> StarOutput:
    """One request: a context of `num_tokens` less the query. seed: of the prompt's tokens."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=output_len,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        logprobs=TOP_LOGPROBS,
        extra_args={"farspan.method": way.method},
    )
    prompt = prompt_of(num_tokens, llm.hosts.facts[0].vocab_size, seed)
    arguments: dict[str, Any] = {"visibility": "star", **way.arguments}
    if arguments["visibility"] == "star":
        arguments.setdefault("anchor", "recompute")
    if way.share:
        arguments["block_len"] = -(-num_tokens // (way.share * llm.page_size)) * llm.page_size
    return llm.generate(prompt[:-QUERY_LEN], prompt[-QUERY_LEN:], params, **arguments)


def distance(output: StarOutput, expected: dict[str, float]) -> float:
    """Largest difference of the first token's log probabilities to another engine's; see `logprob_distance`."""
    entries = output.output.outputs[0].logprobs[0]
    ours = {str(token): entry.logprob for token, entry in entries.items()}
    shared = ours.keys() & expected.keys()
    return max((abs(ours[token] - expected[token]) for token in shared), default=float("inf"))


class Bench:
    """All engines, and what has been measured on them."""

    def __init__(self, recorder: Recorder, stack: ExitStack) -> None:
        """Start all of them together; `stack` ends them."""
        self.recorder, self.dry_run = recorder, recorder.dry_run
        self.model, self.label = model_of(self.dry_run)
        self.is_chosen = bool(recorder.cases.pattern)
        names = ("fa3", "tp2-fa3", "ring", *(way.variant for way in ways(self.dry_run)))
        self.cases = [case for case in cases(self.dry_run) if any(self.wants(case.length, name) for name in names)]
        if not self.cases:
            raise BenchmarkError(f"--cases: {recorder.cases.pattern!r} is in no name of a length and an engine")
        self.medians: dict[tuple[int, str], float] = {}
        self.failed: set[str] = set()
        """Peers that have failed."""
        self.mark = ""
        self.first: dict[int, Timing] = {}
        """One GPU's answers, by length."""
        deadline = time.monotonic() + TIMEOUT_S
        specs: dict[str, EngineSpec | None] = {
            "fa3": self.spec("fa3", 1),
            "tp2-fa3": None if self.dry_run else self.spec("tp2-fa3", NUM_HOSTS),
        }
        dtype = torch.float32 if self.dry_run else torch.bfloat16
        # Processes come up while this one waits for the hosts.
        self.engines: dict[str, Engine] = {}
        self.ends: dict[str, ExitStack] = {}
        for name, spec in specs.items():
            if spec is not None:
                self.ends[name] = stack.enter_context(ExitStack())
                self.engines[name] = self.ends[name].enter_context(Engine(spec, deadline))
        self.ring: RingHosts | None = None
        if any(self.wants(case.length, "ring") for case in self.cases):
            self.ring = stack.enter_context(RingHosts(RingSpec(self.model, dtype), NUM_HOSTS, deadline))
        self.star: StarLLM | None = None
        self.suffix = ""
        if any(self.wants(case.length, way.variant) for case in self.cases for way in ways(self.dry_run)):
            self.star, self.suffix = stack.enter_context(self.start_star())
        for name in list(self.engines):
            self.attempt(name, self.engines[name].receive)
        if self.ring is not None:
            self.attempt("ring", self.ring.wait)

    def wants(self, length: int, name: str) -> bool:
        """Whether a length is to be measured on an engine: by default, or as `--cases` says."""
        if self.is_chosen:
            return self.recorder.wants(f"{self.case_of(length)} {name}")
        if name.startswith("farspan-star-") and length > MOST_ON_ONE_GPU:
            return name.removeprefix("farspan-star-") in LONGEST
        return name != "fa3" or length <= MOST_ON_ONE_GPU

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do a peer's work; where it fails, say so and go on without the peer."""
        if name in self.failed:
            return
        try:
            work()
        except BenchmarkError as error:
            self.failed.add(name)
            self.recorder.note(f"{name} is left out from here on: {error}")

    def spec(self, name: str, num_gpus: int) -> EngineSpec | None:
        """An engine of vLLM's own attention for what is wanted of it; None where that is nothing."""
        requests = [Request(each.length, OUTPUT_LEN) for each in self.cases if self.wants(each.length, name)]
        if not requests:
            return None
        if self.dry_run:
            return EngineSpec(requests, self.model)
        arguments = memory_of(self.model, max(each.prompt_len for each in requests) + 1024, num_gpus)
        return EngineSpec(requests, self.model, "FLASH_ATTN", engine=arguments | {"tensor_parallel_size": num_gpus})

    @contextmanager
    def start_star(self) -> Iterator[tuple[StarLLM, str]]:
        """Two hosts that decode in CUDA graphs; where they do not start that way, without, and rows say so."""
        max_len = max(case.length for case in self.cases) + 1024
        engine: dict[str, Any] = {"load_format": "seeded_random", "skip_tokenizer_init": True, "seed": 0}
        engine["max_model_len"] = max_len
        environment = dict(WORKER_ENV)
        environment["PYTHONPATH"] = python_path()
        if self.dry_run:
            engine |= {"enforce_eager": True, "dtype": "float32", "block_size": 16}
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        else:
            # A host may have all of a context, and the copy of its anchor.
            engine |= memory_of(self.model, max_len + max_len // 8)
            # A shared anchor of that many tokens is one chunk, so that the others wait for one layer of it.
            engine["max_num_batched_tokens"] = CHUNK_LEN
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1]}
            engine["compilation_config"] = graphs
        options = {"prefill": {"method": "flex", "gamma": GAMMA}}
        common: dict[str, Any] = {"timeout_s": 60, "start_timeout_s": 200, "env": environment, "options": options}
        common["visibility"] = "all"
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(self.model))
            suffix = ""
            try:
                llm = BenchStar(folder, NUM_HOSTS, graphs=not self.dry_run, **common, **engine)
            except StarError as error:
                if self.dry_run:
                    raise
                self.recorder.note(f"hosts with decode in graphs did not start ({error}); without graphs instead")
                llm, suffix = BenchStar(folder, NUM_HOSTS, **common, **engine), "-eager"
            with llm:
                yield llm, suffix

    def measure(self, case: Case) -> None:
        """All rows of one length."""
        is_early = case.length <= MOST_ON_ONE_GPU
        if is_early:
            self.measure_engine("fa3", case)
        elif "fa3" in self.ends and not any(self.wants(each.length, "fa3") for each in self.longer(case)):
            # Its memory is needed.
            self.ends["fa3"].close()
        if self.star is not None and case.length <= MOST_CHECKED and case.length in self.first:
            self.check(self.star, case)
        self.measure_engine("tp2-fa3", case)
        if self.star is not None:
            self.measure_ways(self.star, case)
        ring = self.ring
        if ring is not None and self.wants(case.length, "ring"):
            self.attempt("ring", lambda: self.record_ring(case, ring))
        if not is_early:
            # The longest time of all.
            self.measure_engine("fa3", case)
        self.report(case.length)

    def measure_ways(self, star: StarLLM, case: Case) -> None:
        """Rows of the hosts' ways of reading that are wanted of a length."""
        for number, way in enumerate(ways(self.dry_run)):
            if not self.wants(case.length, way.variant):
                continue
            seeds = [1000 * (number + 1) + case.length + repeat for repeat in range(case.repeats)]
            try:
                outputs = [ask_star(star, case.length, way, seed) for seed in seeds]
            except StarError as error:
                self.recorder.note(f"n{case.length} {way.variant}: {error}")
                continue
            self.record_star(case.length, way.variant + self.mark, outputs)

    def longer(self, case: Case) -> list[Case]:
        """A case, and those of more tokens."""
        return [each for each in self.cases if each.length >= case.length]

    def measure_engine(self, name: str, case: Case) -> None:
        """Rows of one of vLLM's own engines, where they are wanted."""
        if name in self.engines and self.wants(case.length, name):
            self.attempt(name, lambda: self.record_engine(name, case))

    def check(self, star: StarLLM, case: Case) -> None:
        """Whether two blocks on two hosts give one GPU's first token; rows of Star are marked from here on if not."""
        # The prompt of the other engine's first.
        output = ask_star(star, case.length, Way("n2", NUM_HOSTS), seed=case.length)
        far = distance(output, self.first[case.length].top_logprobs)
        self.recorder.note(f"n{case.length}: two blocks give log probabilities {far:.3f} from one GPU's")
        if not far <= LOGPROB_TOLERANCE:
            self.recorder.note(f"that is more than {LOGPROB_TOLERANCE}: rows of Star are marked as wrong")
            self.mark = "-wrong"

    def case_of(self, length: int) -> str:
        return f"n{length}-b1-{self.label}"

    def add(self, length: int, kind: str, variant: str, samples: list[float]) -> None:
        """A row of times in ms. kind: what follows the case's name."""
        self.recorder.add(NAME, f"{self.case_of(length)}{kind}", variant, "time", "ms", samples)
        self.medians[length, f"{variant}{kind}"] = quantile(samples, 0.5)

    def record_engine(self, name: str, case: Case) -> None:
        """Rows of one of vLLM's own engines. Raises BenchmarkError where it fails."""
        request = Request(case.length, OUTPUT_LEN, case.repeats)
        timings = [self.engines[name].answer(request, repeat).timing for repeat in range(case.repeats)]
        if name == "fa3":
            self.first[case.length] = timings[0]
        self.add(case.length, "", name, [each.ttft_ms for each in timings])
        self.add(case.length, "-tpot", name, [ms for each in timings for ms in each.tpot_ms[1:]])

    def record_star(self, length: int, variant: str, outputs: list[StarOutput]) -> None:
        """Rows of requests with the same blocks."""
        times = [each.times for each in outputs]
        self.add(length, "", variant, [each.first_token_s * 1e3 for each in times])
        self.add(length, "-phase1", variant, [each.phase_1_s * 1e3 for each in times])
        self.add(length, f"-tpot{self.suffix}", variant, [ms * 1e3 for each in times for ms in each.token_s[1:]])
        exchanged = [each.exchanged_bytes / 2**20 for each in times]
        self.recorder.add(NAME, self.case_of(length), variant, "exchanged", "MiB", exchanged)
        hosts = ", ".join(f"{seconds:.3f}" for seconds in times[-1].host_s)
        self.recorder.note(f"{variant}: hosts at work {hosts} s in phase 1")

    def record_ring(self, case: Case, ring: RingHosts) -> None:
        tokens = torch.tensor(prompt_of(case.length, self.model["vocab_size"], case.length))
        # Of several, the first fills torch's cache of memory.
        first = int(case.repeats > 1)
        answers = ring.prefill(tokens, case.repeats + first)
        slowest = [max(times) for times in zip(*(each.prefill_ms[first:] for each in answers), strict=True)]
        self.add(case.length, "", "ring", slowest)
        exchanged = sum(each.num_bytes for each in answers) / 2**20
        self.recorder.add(NAME, self.case_of(case.length), "ring", "exchanged", "MiB", [exchanged])

    def report(self, length: int) -> None:
        """Goals of this length, reached or missed."""
        peer = self.medians.get((length, "tp2-fa3"))
        for name, goal in GOALS.items():
            ours = self.medians.get((length, f"farspan-star-{name}"))
            if length == GOAL_LEN and peer and ours:
                verdict = "reached" if peer / ours >= goal else "MISSED"
                self.recorder.note(f"{name}: {peer / ours:.2f} times tp2-fa3's speed, goal {goal} {verdict}")
        half = self.medians.get((length // NUM_HOSTS, "fa3-tpot"))
        ours = self.medians.get((length, f"farspan-star-n4-tpot{self.suffix}"))
        if half and ours and not self.dry_run:
            more = (ours - half) * ALL_LAYERS / NUM_LAYERS
            verdict = "reached" if more <= GOAL_TOKEN_MS else "MISSED"
            self.recorder.note(
                f"n{length}: a token takes {ours - half:.3f} ms more than on one GPU with half the KV, {more:.2f} ms "
                f"with {ALL_LAYERS} layers; goal {GOAL_TOKEN_MS} {verdict}"
            )


def run(recorder: Recorder) -> None:
    if not recorder.dry_run and torch.cuda.device_count() < NUM_HOSTS:
        recorder.note(f"left out: needs {NUM_HOSTS} GPUs, there is {torch.cuda.device_count()}")
        return
    started = time.monotonic()
    with ExitStack() as stack:
        bench = Bench(recorder, stack)
        recorder.note(f"all engines up after {time.monotonic() - started:.0f} s")
        # Fills what is allocated at first use.
        longest = bench.cases[-1].length
        for way in ways(recorder.dry_run):
            if bench.star is not None and any(bench.wants(case.length, way.variant) for case in bench.cases):
                ask_star(bench.star, longest // 16, way, seed=1, output_len=2)
        for case in bench.cases:
            bench.measure(case)
            recorder.note(f"n{case.length} done after {time.monotonic() - started:.0f} s")


def python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
