"""What rules for choosing blocks read, keep and change on a real checkpoint and real texts, beside dense prefill.

Same prompts, same engine options, forced to be sparse at every length: flex with gamma 0.9 and 0.95, FlexPrefill's own
rule, the first block and as many local ones as flex reads at gamma 0.95, and the oracle, the fewest blocks of each tile
and head that keep gamma 0.95 of the mass of all its rows. Coverage is that of whole heads on rows that did not choose
and could lose something; drift and changed tokens are those of the second half of each prompt. On a GPU also the times
to the first token. With `--questions` every rule answers needles in prose, with `--prompts 0` these alone. Without a
checkpoint the bundled model reads its own questions in a dry run, and nothing otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from farspan.engine_ext.config import FlexPrefill
from farspan.evaluation.audit import (
    AuditSettings,
    Probe,
    audit_engine,
    change_of_probes,
    check_settings,
    cut_prompts,
    first_token_seconds,
    probe,
    read_tokens,
    request_options,
)
from farspan.evaluation.audit_results import DRIFT_LIMIT, SURE_ERROR, kept_of, mean_heads
from farspan.evaluation.evaluate import EvalSettings, make_samples
from farspan.evaluation.results import Cell

from benchmarks.real_table import QUESTIONS
from benchmarks.record import BenchmarkError, Recorder

if TYPE_CHECKING:
    from farspan.needle.tasks import Sample

NAME = "real"
WORKER = "benchmarks.real_worker.RuleMetrics"
DENSE = "farspan"
MIN_RIGHT_SHARE = 0.99
"""Of the heads that must keep gamma - 0.01."""
TIMED_REPEATS = 3
ANSWER_ROOM = 128
"""Tokens of a length that questions leave to the answer."""

NEEDS_GPU = False


@dataclass(frozen=True)
class Variant:
    """One rule and its gamma."""

    name: str
    selection: str
    gamma: float | None
    rule: str = "flex"
    """Of `benchmarks.real_worker.RuleSelector`; `sink_local` for its number of local blocks."""


VARIANTS = (
    Variant("farspan-g0.95", "tile_rows", 0.95),
    Variant("farspan-g0.9", "tile_rows", 0.9),
    Variant("farspan-g0.98", "tile_rows", 0.98),
    Variant("sink-local", "tile_rows", 0.95, "sink_local"),
    Variant("oracle-g0.95", "tile_rows", 0.95, "oracle"),
    Variant("farspan-flexprefill-g0.95", "flexprefill", 0.95),
    Variant("farspan-flexprefill-g0.9", "flexprefill", 0.9),
)


@dataclass(frozen=True)
class Inputs:
    """A checkpoint and what it reads."""

    model: str
    texts: tuple[Path, ...]
    label: str
    lengths: tuple[int, ...]
    prompts: int
    questions: int
    variants: tuple[str, ...] = ()
    """Names in VARIANTS; all if empty."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""
    seconds: float | None = None
    """`rules` and `star_quality` begin nothing further after that long."""
    is_timed: bool = True
    """Whether `real` takes times, which say nothing where something else runs on the GPU."""
    kinds: tuple[str, ...] = ()
    """Of the questions of `star_quality`, in its REAL_GROUPS; all if empty."""


def cases(dry_run: bool) -> list[int]:
    """List the lengths of the dry run; those of a checkpoint come from the command line."""
    return [2048] if dry_run else []


def run(recorder: Recorder, inputs: Inputs | None) -> None:
    on_texts(recorder, inputs, measure, lengths=tuple(cases(True)), prompts=1, questions=1)


def on_texts(
    recorder: Recorder, inputs: Inputs | None, work: Callable[[Recorder, Inputs], None], **of_dry_run: Any
) -> None:
    """Do the work on what was named; in a dry run without a checkpoint the bundled model reads its own questions."""
    if inputs is not None:
        work(recorder, inputs)
        return
    if not recorder.dry_run:
        recorder.note("no checkpoint: name one with --model, --text and --label")
        return
    with TemporaryDirectory() as folder:
        text = write_questions(Path(folder, "text"))
        work(recorder, Inputs("needle", (text,), "needle", **of_dry_run))


def write_questions(path: Path) -> Path:
    """A text that the bundled model knows."""
    from farspan.needle.tasks import make_sample

    path.write_text("\n".join(make_sample("niah_single", 1500, seed).prompt for seed in range(3)))
    return path


def measure(recorder: Recorder, inputs: Inputs) -> None:
    """Run every variant, those of one selection in one engine."""
    unknown = set(inputs.variants) - {each.name for each in VARIANTS}
    if unknown:
        raise BenchmarkError(f"variants {sorted(unknown)}; known are {', '.join(each.name for each in VARIANTS)}")
    variants = [each for each in VARIANTS if not inputs.variants or each.name in inputs.variants]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chunk = 1024 if recorder.dry_run else 2048
    dense: dict[int, list[Probe]] = {}
    for selection in dict.fromkeys(each.selection for each in variants):
        settings, prefill = engine_settings(inputs, selection, chunk)
        prompts = pieces_of(inputs, settings)
        with audit_engine(settings, prefill, chunk, device) as llm:
            for length, mine in prompts.items():
                case = f"n{length}-{inputs.label}-{'fp32' if device == 'cpu' else 'bf16'}"
                if length not in dense:
                    dense[length] = [probe(llm, tokens, request_options(None)) for tokens in mine]
                    record_answers(recorder, llm, inputs, length, case, DENSE, request_options(None))
                density = 0.0
                for variant in (each for each in variants if each.selection == selection):
                    rule: str | int = variant.rule
                    if rule == "sink_local":
                        if density == 0:
                            recorder.note(
                                "sink-local has the density of farspan-g0.95, which must be run too: left out"
                            )
                            continue
                        rule = local_blocks(length, density)
                    llm.collective_rpc("farspan_rule", args=(rule,))
                    options = request_options(variant.gamma)
                    sparse = [probe(llm, tokens, options) for tokens in mine]
                    if sparse:
                        found = record(recorder, case, variant, dense[length], sparse)
                    else:
                        found = density_of(probe(llm, question_tokens(llm, inputs, length), options))
                    density = density or found
                    record_answers(recorder, llm, inputs, length, case, variant.name, options)
                llm.collective_rpc("farspan_rule", args=("flex",))
                if device == "cuda" and inputs.is_timed and mine:
                    record_times(
                        recorder, llm, mine[0], case, [each for each in variants if each.selection == selection]
                    )


def engine_settings(inputs: Inputs, selection: str, chunk: int) -> tuple[AuditSettings, FlexPrefill]:
    """What an engine of one selection is opened with. Raises ConfigError for what an audit refuses."""
    settings = AuditSettings(
        model=inputs.model,
        texts=inputs.texts,
        lengths=inputs.lengths,
        gammas=(0.95,),
        out=Path(),
        prompts=max(inputs.prompts, 1),
        options={"selection": selection},
        engine_args={"enforce_eager": True} | inputs.engine_args,
    )
    prefill = check_settings(settings, chunk)
    return replace(settings, engine_args=settings.engine_args | {"worker_extension_cls": WORKER}), prefill


def record(recorder: Recorder, case: str, variant: Variant, dense: Sequence[Probe], sparse: Sequence[Probe]) -> float:
    """Record what one variant did, and return its density."""
    heads = mean_heads([each.heads for each in sparse])
    gamma = variant.gamma or 1.0
    kept, change = kept_of(heads, gamma), change_of_probes(dense, sparse)

    def add(metric: str, unit: str, samples: Sequence[float]) -> None:
        recorder.add(NAME, case, variant.name, metric, unit, samples)

    add("density", "fraction", [head["density"] for head in heads])
    add("coverage", "fraction", [head["coverage"] for head in heads])
    add("coverage_min", "fraction", [kept.worst_head])
    add("below_gamma_0.01", "fraction", [kept.heads_below_01])
    add("below_gamma_0.05", "fraction", [kept.heads_below_05])
    add("chunks_below_gamma_0.05", "fraction", [kept.chunks_below_05])
    add("drift", "nats/token", [change.drift])
    add("drift_error", "nats/token", [change.drift_error])
    add("changed", "fraction", [change.changed])
    reached = change.drift + 2 * change.drift_error >= DRIFT_LIMIT and change.drift_error <= SURE_ERROR
    recorder.note(
        f"{case} {variant.name}: {len(sparse)} prompts, {change.num_tokens} tokens; drift {change.drift:+.4f} "
        f"± {change.drift_error:.4f}, goal {DRIFT_LIMIT} with a standard error of {SURE_ERROR} "
        f"{'reached' if reached else 'MISSED'}; heads above gamma - .01 {1 - kept.heads_below_01:.3f}, goal "
        f"{MIN_RIGHT_SHARE} {'reached' if 1 - kept.heads_below_01 >= MIN_RIGHT_SHARE else 'MISSED'}; below gamma - .05 "
        f"{kept.heads_below_05:.3f}, goal 0 {'reached' if kept.heads_below_05 == 0 else 'MISSED'}"
    )
    return kept.density


def local_blocks(length: int, density: float) -> int:
    """Local blocks that read, with the first one, at least this share of the causal blocks."""
    num_tiles = -(-(length - 1) // 128)
    causal = num_tiles * (num_tiles + 1) // 2
    for local in range(1, num_tiles + 1):
        if sum(min(tile + 1, local + 1) for tile in range(num_tiles)) >= density * causal:
            return local
    return num_tiles


def pieces_of(inputs: Inputs, settings: AuditSettings) -> dict[int, list[list[int]]]:
    """The pieces of the texts that are read, by length; none where questions alone are wanted."""
    if not inputs.prompts:
        return {length: [] for length in inputs.lengths}
    return cut_prompts(settings, read_tokens(settings.model, settings.texts))


def density_of(found: Probe) -> float:
    """Mean over layers and heads."""
    heads = mean_heads([found.heads])
    return sum(head["density"] for head in heads) / len(heads)


def questions_of(inputs: Inputs, task: str, length: int, count: int) -> "list[Sample]":
    settings = EvalSettings(inputs.model, (task,), (length - ANSWER_ROOM,), Path(), count=count)
    return make_samples(settings, Cell(task, task, length - ANSWER_ROOM, None, 7, count))


def question_tokens(llm: Any, inputs: Inputs, length: int) -> list[int]:
    """The first question's prompt."""
    (sample,) = questions_of(inputs, QUESTIONS[0], length, 1)
    tokens: list[int] = llm.get_tokenizer().encode(sample.prompt)
    return tokens[: length - 1]


def record_answers(
    recorder: Recorder, llm: Any, inputs: Inputs, length: int, case: str, name: str, extra_args: dict[str, Any]
) -> None:
    """Ask generated questions, where some are wanted."""
    from farspan.needle.tasks import score
    from vllm import SamplingParams

    if not inputs.questions:
        return
    llm.collective_rpc("farspan_audit", args=(False,))
    for task in QUESTIONS:
        scores = []
        for sample in questions_of(inputs, task, length, inputs.questions):
            most = min(sample.max_new_tokens, ANSWER_ROOM - 1)
            params = SamplingParams(temperature=0.0, max_tokens=most, extra_args=dict(extra_args))
            (output,) = llm.generate([sample.prompt], params, use_tqdm=False)
            scores.append(score(output.outputs[0].text, sample))
        recorder.add(NAME, f"{case}-{task}", name, "accuracy", "fraction", [sum(scores) / len(scores)])
    llm.collective_rpc("farspan_audit", args=(True,))


def record_times(recorder: Recorder, llm: Any, tokens: list[int], case: str, variants: Sequence[Variant]) -> None:
    """Times to the first token, in turns, without measuring; of the rules that a user can choose."""
    llm.collective_rpc("farspan_audit", args=(False,))
    timed = {DENSE: request_options(None)}
    timed |= {each.name: request_options(each.gamma) for each in variants if each.rule == "flex"}
    samples: dict[str, list[float]] = {}
    for repeat in range(1 + TIMED_REPEATS):
        for name, options in timed.items():
            elapsed = 1e3 * first_token_seconds(llm, tokens, options)
            if repeat > 0:
                samples.setdefault(name, []).append(elapsed)
    for name, values in samples.items():
        recorder.add(NAME, f"{case}-eager", name, "time", "ms", values)
    llm.collective_rpc("farspan_audit", args=(True,))
