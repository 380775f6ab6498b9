"""`farspan eval`: accuracy of attention methods on generated long-context tasks, through a real vLLM engine.

Every cell (method, task, length, depth) becomes one row of `OUT/eval.csv` as soon as it is done; a later run with the
same settings skips the rows that are there. The same settings always ask the same questions.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.command import make_folder, one_line, sentence_of
from farspan.engine_ext.config import parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.reading import duration, estimate_s, extension, reads_selection, selection_columns
from farspan.evaluation.results import CSV_COLUMNS, CSV_NAME, Cell, append_csv, read_csv
from farspan.metrics import read_selection
from farspan.needle import model_dir
from farspan.tables import check_columns
from farspan.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from farspan.needle.tasks import Sample

# Options of each method before those of the user; None is vLLM's own backend.
METHODS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "dense": {"prefill": {"method": "dense"}},
    # Sparse at any length: what is asked is how it answers, not whether it is faster.
    # Coverage is measured on rows other than those that choose the blocks.
    "flex": {"prefill": {"method": "flex", "min_seq_len": 0, "min_chunk_len": 0, "coverage_rows": 8}},
    "block_sparse": {"prefill": {"method": "block_sparse"}},
    "string": {"string": {}},
}

# Questions of different --seed never meet.
SEEDS_PER_RUN = 1_000_000
# A model that is not ours may say a few words before the answer.
EXTRA_NEW_TOKENS = 32
ANSWER_ROOM = 128
"""Tokens of the model's length that are left to the longest answer."""
IDENTITY_NAME = "eval.json"
OLD_QUESTIONS = {"form": "words"}
"""What folders hold that do not say."""
DAMAGED = "remove it together with its tables, or choose another --out"

# On a CPU, where the KV cache is a part of the host's memory.
CPU_BLOCK = 128
FLOAT32_BYTES = 4
MAX_CPU_SEQS = 8
CPU_KV_BYTES = 4 * 2**30
"""Below this, several prompts at once; above it, one."""
MEMORY_ARGUMENTS = {"gpu_memory_utilization", "kv_cache_memory_bytes"}
"""With one of these the user sizes the KV cache."""

FORMS = ("auto", "ruler", "words")
"""How questions are written: RULER's form, or the words that the bundled model knows."""


@dataclass(frozen=True)
class Model:
    """A model behind an engine."""

    generate: Callable[..., list[str]]
    """The generated texts of some questions; a second argument is the requests' own options, as `extra_args`."""
    selection: Callable[[], list[dict[str, Any]]] | None = None
    """What flex read since the last call, as `read_selection` gives it; None where nobody collects it."""


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate; see `farspan eval --help` for each field."""

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    out: Path
    methods: tuple[str, ...] = ("dense",)
    depths: tuple[float, ...] = ()
    """Places of the needle, 0 = start, 1 = end; drawn by the seed if empty."""
    seed: int = 0
    count: int = 20
    """Questions per cell."""
    chunk: int | None = None
    """Prompt tokens in one engine step (max_num_batched_tokens); vLLM's choice if None."""
    options: dict[str, Any] = field(default_factory=dict)
    """farspan options for every method but `stock`, or a mapping of method name to such options."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""
    questions: str = "auto"
    """Of `FORMS`; auto is RULER's form for every model but the bundled one."""
    chat_template: bool = True
    """Whether questions in RULER's form go through the tokenizer's chat template, where it has one."""
    haystack: tuple[Path, ...] = ()
    """Text files whose sentences the needles lie between; prose of our own if empty."""

    @property
    def form(self) -> str:
        """How questions are written: "ruler" or "words"."""
        if self.questions != "auto":
            return self.questions
        return "words" if self.model == "needle" else "ruler"


def run_eval(
    settings: EvalSettings, open_model: "Callable[..., AbstractContextManager[Model]] | None" = None
) -> list[Cell]:
    """Evaluate what is missing in `settings.out`, and return all cells of the settings in order.

    open_model: given the settings and a method's options, a context manager that yields a model; `vllm_model` if None.
    Says on stderr how long it will take, after the first question.
    Raises ConfigError, before any model is loaded, for an unknown model, task, method, length or option.
    """
    options = {method: method_options(method, settings) for method in settings.methods}
    check_settings(settings)
    open_model = open_model or vllm_model
    make_folder(settings.out)
    done = {cell.question: cell for cell in read_cells(settings)}
    cells = list(all_cells(settings))
    todo = [cell for cell in cells if cell not in done]

    from tqdm import tqdm

    with tqdm(total=len(cells), initial=len(cells) - len(todo), desc="farspan eval", unit="cell") as progress:
        begin, is_first = time.monotonic(), True
        for method in dict.fromkeys(cell.method for cell in todo):
            with open_model(settings, options[method]) as model:
                load_s = time.monotonic() - begin
                claim_folder(settings)
                for cell in todo:
                    if cell.method != method:
                        continue
                    progress.set_postfix_str(f"{method} {cell.task} {cell.length}")
                    samples = make_samples(settings, cell)
                    predictions: list[str] = []
                    if is_first:
                        is_first, asked = False, time.monotonic()
                        predictions = model.generate(samples[:1])
                        said = estimate(settings, todo, time.monotonic() - asked, load_s)
                        progress.write(said, file=sys.stderr)
                    predictions += (
                        model.generate(samples[len(predictions) :]) if len(samples) > len(predictions) else []
                    )
                    rows = model.selection() if model.selection is not None else None
                    done[cell] = replace(
                        cell,
                        accuracy=accuracy(samples, predictions),
                        **selection_columns(options[method], rows, cell.length),
                    )
                    append_csv(settings.out / CSV_NAME, done[cell])
                    progress.update()
    return [done[cell] for cell in cells]


def estimate(settings: EvalSettings, todo: Sequence[Cell], first_s: float, load_s: float) -> str:
    """How long the cells will take, for a person.

    first_s: what the first question of the first cell took; load_s: what its engine took to start.
    """
    lengths, first = [cell.length for cell in todo], todo[0].length
    seconds = estimate_s(model_path(settings.model), lengths, settings.count, first_s, first)
    more_loads = len({cell.method for cell in todo}) - 1
    return (
        f"about {duration(seconds + more_loads * load_s)} for {len(todo)} cells of {settings.count} questions, less "
        f"where an engine answers several at once: one question of {first} tokens took {first_s:.1f} s"
    )


def all_cells(settings: EvalSettings) -> Iterator[Cell]:
    """The cells that the settings ask for, method by method."""
    for method in settings.methods:
        for task in settings.tasks:
            for length in settings.lengths:
                for depth in settings.depths or (None,):
                    yield Cell(method, task, length, depth, settings.seed, settings.count)


def accuracy(samples: "Sequence[Sample]", predictions: Sequence[str]) -> float:
    """The mean score of the predictions."""
    from farspan.evaluation.ruler import RulerSample, ruler_score
    from farspan.needle.tasks import score

    scores = [
        (ruler_score if isinstance(sample, RulerSample) else score)(prediction, sample)
        for prediction, sample in zip(predictions, samples, strict=True)
    ]
    return round(sum(scores) / len(scores), 4)


def make_samples(settings: EvalSettings, cell: Cell) -> "list[Sample]":
    """The questions of a cell; prompts have `cell.length` tokens of the model's own tokenizer, or hardly fewer."""
    from farspan.evaluation.prose import read_sentences
    from farspan.evaluation.ruler import make_ruler_sample
    from farspan.needle.tasks import make_sample

    tokenizer = load_tokenizer(settings.model) if settings.model != "needle" else None
    seeds = [settings.seed * SEEDS_PER_RUN + i for i in range(cell.count)]
    samples: list[Sample]
    if settings.form == "words":
        samples = [make_sample(cell.task, cell.length, seed, depth=cell.depth, tokenizer=tokenizer) for seed in seeds]
        if tokenizer is None:
            return samples
    else:
        assert tokenizer is not None
        sentences = read_sentences(settings.haystack)
        samples = [
            make_ruler_sample(
                cell.task,
                cell.length,
                seed,
                tokenizer,
                depth=cell.depth,
                chat=settings.chat_template,
                sentences=sentences,
            )
            for seed in seeds
        ]
    lens = [len(tokenizer.encode(sample.completion)) + EXTRA_NEW_TOKENS for sample in samples]
    return [replace(sample, max_new_tokens=min(most, ANSWER_ROOM)) for sample, most in zip(samples, lens, strict=True)]


def method_options(method: str, settings: EvalSettings) -> dict[str, Any] | None:
    """The farspan options of a method: its preset with the user's on top; None for `stock`.

    With options by method, a name that is no preset is a method of its own (`flex-g0.9`).
    Raises ConfigError for an unknown method or option.
    """
    by_method = bool(settings.options) and set(settings.options) <= set(settings.methods)
    if method not in METHODS and not (by_method and method in settings.options):
        raise ConfigError(
            f"method={method!r}; known methods are {', '.join(METHODS)}. Any other name needs its options: "
            f'--options \'{{"{method}": {{"prefill": {{"method": "flex", "gamma": 0.9}}}}}}\''
        )
    preset = METHODS.get(method, {})
    if preset is None:
        return None
    extra = settings.options.get(method, {}) if by_method else settings.options
    if not isinstance(extra, dict):
        raise ConfigError(f"options of method {method!r} are {extra!r}; write them as a JSON object")
    options = merge_options(preset, extra)
    parse_config(options)
    return options


def merge_options(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`base` with `extra` on top, nested mappings merged."""
    merged = dict(base)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge_options(merged[key], value)
        else:
            merged[key] = value
    return merged


def check_settings(settings: EvalSettings) -> None:
    """Raise ConfigError for an unknown model or task, or a number out of range."""
    from farspan.evaluation.prose import read_sentences
    from farspan.needle.tasks import MIN_LENGTH, TASKS

    path = model_path(settings.model)
    for task in settings.tasks:
        if task not in TASKS:
            raise ConfigError(f"task={task!r}; known tasks are {', '.join(TASKS)}")
    limit = max_position(path, settings.engine_args)
    for length in settings.lengths:
        if length < MIN_LENGTH or (limit is not None and length + ANSWER_ROOM > limit):
            most = ""
            if limit is not None:
                most = f" and at most {limit - ANSWER_ROOM}: max_position_embeddings less {ANSWER_ROOM} for the answer"
            raise ConfigError(f"length={length}; lengths are in tokens, at least {MIN_LENGTH}{most}")
    if settings.questions not in FORMS:
        raise ConfigError(f"questions={settings.questions!r}; known are {', '.join(FORMS)}")
    if settings.model == "needle" and settings.form == "ruler":
        raise ConfigError("questions='ruler', but the bundled model knows its own words alone; use 'auto' or 'words'")
    if settings.haystack:
        if settings.form == "words":
            raise ConfigError("haystack is for questions in RULER's form; the form 'words' has filler of its own")
        read_sentences(settings.haystack)
    for depth in settings.depths:
        if not 0 <= depth <= 1:
            raise ConfigError(f"depth={depth}; depths lie between 0 (start of the prompt) and 1 (end)")
    if settings.count < 1:
        raise ConfigError(f"count={settings.count}; it must be at least 1")
    if settings.seed < 0:
        raise ConfigError(f"seed={settings.seed}; it must be at least 0")
    if settings.chunk is not None and settings.chunk < 1:
        raise ConfigError(f"chunk={settings.chunk}; it must be at least 1 token")
    for name, values in (("tasks", settings.tasks), ("lengths", settings.lengths), ("methods", settings.methods)):
        if not values:
            raise ConfigError(f"{name} is empty; name at least one, separated by commas")


def model_path(model: str) -> str:
    """What vLLM loads for a model's name: the bundled folder, a folder, or a Hub name.

    Raises ConfigError if it is none of these.
    """
    if model == "needle":
        return str(model_dir())
    if (Path(model) / "config.json").is_file():
        return model
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ConfigError(
            f"model={model!r} is not a folder with a config.json; give such a folder, `needle` for the bundled model, "
            "or a Hugging Face name such as org/name"
        )
    return model


def max_position(path: str, engine_args: dict[str, Any]) -> int | None:
    """The model's max_position_embeddings, or the user's; None if it is not on this machine or does not say.

    Raises ConfigError where one of them is no number, or config.json no JSON object.
    """
    overrides = engine_args.get("hf_overrides")
    source, found = "engine_args", overrides if isinstance(overrides, dict) else {}
    file = Path(path) / "config.json"
    if "max_position_embeddings" not in found and file.is_file():
        source, found = str(file), read_json_object(file, "give the folder of a model that vLLM can load")
    limit = found.get("max_position_embeddings")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise ConfigError(f"max_position_embeddings={limit!r} in {source}; it must be a whole number of tokens")
    return limit


def read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ConfigError; remedy: what to do, a half sentence."""
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: it is not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is damaged: it holds no JSON object; {remedy}")
    return value


@contextmanager
def vllm_model(settings: EvalSettings, options: dict[str, Any] | None) -> Iterator[Model]:
    """A vLLM engine with the model of the settings and one method's options; shut down on exit.

    Greedy decoding and no prefix caching, so that every answer comes from the method's own prefill. Raises ConfigError
    for what vLLM refuses.
    """
    from vllm import SamplingParams

    with open_engine(settings.model, engine_arguments(settings, options)) as llm:

        def generate(samples: "Sequence[Sample]", extra_args: dict[str, Any] | None = None) -> list[str]:
            parameters = [
                SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens, extra_args=extra_args)
                for sample in samples
            ]
            prompts = [engine_prompt(sample) for sample in samples]
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            return [output.outputs[0].text for output in outputs]

        if reads_selection(options, settings.engine_args):
            read_selection(llm, reset=True)  # of warming up
            yield Model(generate, partial(read_selection, llm, reset=True))
        else:
            yield Model(generate)


@contextmanager
def open_engine(model: str, arguments: dict[str, Any]) -> Iterator[Any]:
    """A `vllm.LLM`, shut down on exit. Raises ConfigError for what vLLM refuses. model: its name in that sentence."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(**arguments)
    except (TypeError, ValueError, NotImplementedError, OSError) as error:
        reason = sentence_of(error) or one_line(str(error))
        raise ConfigError(f"vLLM refuses the engine of model {model!r}: {reason}") from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def engine_prompt(sample: "Sample") -> Any:
    """A question as `LLM.generate` takes it."""
    from farspan.evaluation.ruler import RulerSample

    return {"prompt_token_ids": list(sample.token_ids)} if isinstance(sample, RulerSample) else sample.prompt


def engine_arguments(settings: EvalSettings, options: dict[str, Any] | None) -> dict[str, Any]:
    """What `vllm.LLM` is given: room for the longest prompts asked, and the user's own arguments on top."""
    from vllm.platforms import current_platform

    arguments: dict[str, Any] = {
        "model": model_path(settings.model),
        "seed": settings.seed,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "max_model_len": max(settings.lengths) + ANSWER_ROOM,
    }
    if settings.chunk is not None:
        arguments["max_num_batched_tokens"] = settings.chunk
        # vLLM refuses more sequences than tokens in a step.
        arguments["max_num_seqs"] = min(settings.chunk, 256)
    if current_platform.is_cpu() and not MEMORY_ARGUMENTS & settings.engine_args.keys():
        # vLLM's own 0.92 of the host's memory refuses to start beside any other program of some size.
        arguments |= prompt_room(settings)
    if options is not None:
        arguments |= {"attention_backend": "CUSTOM", "additional_config": {"farspan": options}}
        arguments |= extension(options, settings.engine_args)
    return arguments | settings.engine_args


def prompt_room(settings: EvalSettings) -> dict[str, Any]:
    """Engine arguments that keep as much KV cache as a few of the longest prompts need, in float32 at most."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(settings.model))
    except (OSError, ValueError):  # vLLM says what is wrong with it
        return {}
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * head_dim * FLOAT32_BYTES
    asked_len = settings.engine_args.get("max_model_len")
    max_len = max(asked_len if type(asked_len) is int else 0, max(settings.lengths) + ANSWER_ROOM)
    blocks = -(-max_len // CPU_BLOCK) + 1
    prompt_bytes = blocks * CPU_BLOCK * token_bytes
    num_seqs = max(1, min(settings.count, MAX_CPU_SEQS, CPU_KV_BYTES // prompt_bytes, settings.chunk or MAX_CPU_SEQS))
    # vLLM keeps one block for itself.
    return {"max_num_seqs": num_seqs, "kv_cache_memory_bytes": num_seqs * prompt_bytes + CPU_BLOCK * token_bytes}


def read_cells(settings: EvalSettings) -> list[Cell]:
    """The cells that are already in `settings.out`.

    Raises ConfigError if the folder holds results of another model, chunk or options, or damaged files.
    """
    path = settings.out / IDENTITY_NAME
    if path.exists():
        identity = identity_of(settings)
        found = read_json_object(path, DAMAGED)
        if not (found.keys() >= identity.keys() - {"questions"} and isinstance(found["options"], dict)):
            raise ConfigError(f"{path} is damaged: it lacks one of {', '.join(identity)}; {DAMAGED}")
        for key in ("model", "chunk", "engine_args", "questions"):
            before = found.get(key, OLD_QUESTIONS)
            if before != identity[key]:
                raise ConfigError(
                    f"{path} was made with {key}={before!r}, this run has {identity[key]!r}; choose another --out"
                )
        for method, options in identity["options"].items():
            if found["options"].get(method, options) != options:
                raise ConfigError(
                    f"{path} was made with other options for {method}: {found['options'][method]}; choose another "
                    "--out, or another name for the method"
                )
    elif (settings.out / CSV_NAME).exists():
        raise ConfigError(f"{path} is missing, so nobody knows what made {CSV_NAME} beside it; choose another --out")
    if (settings.out / CSV_NAME).exists():
        check_columns(settings.out / CSV_NAME, CSV_COLUMNS)
    return read_csv(settings.out / CSV_NAME)


def claim_folder(settings: EvalSettings) -> None:
    """Note in `settings.out` what its results are made with; before the first of them is written."""
    path = settings.out / IDENTITY_NAME
    identity = identity_of(settings)
    if path.exists():
        identity["options"] = read_json_object(path, DAMAGED)["options"] | identity["options"]
    path.write_text(json.dumps(identity, indent=2) + "\n")


def identity_of(settings: EvalSettings) -> dict[str, Any]:
    """What results of one folder have in common; options by method, None for `stock`."""
    identity: dict[str, Any] = {key: getattr(settings, key) for key in ("model", "chunk", "engine_args")}
    identity["questions"] = {"form": settings.form}
    if settings.form == "ruler":
        haystack = [str(path) for path in settings.haystack]
        identity["questions"] |= {"chat_template": settings.chat_template, "haystack": haystack}
    return identity | {"options": {method: method_options(method, settings) for method in settings.methods}}
