"""`farspan audit`: what sparse prefill keeps, reads and changes on a model and texts of the user's own, per gamma.

One engine answers every prompt densely and with each gamma, by overrides of the requests. Coverage is measured on query
rows that did not choose the blocks and whose lists may leave something out; drift and changed tokens come from the
log-probs of the second half of each prompt. Every row is written as soon as it is known.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from farspan.command import make_folder
from farspan.engine_ext.config import FlexPrefill, parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.selection.crossover import AttentionSize, layer_ms, sparse_kernel, sparse_pays
from farspan.engine_ext.support import PREFERRED_PAGE_SIZE
from farspan.evaluation.audit_results import (
    CSV_COLUMNS,
    HEAD_COLUMNS,
    AuditRow,
    change_of,
    csv_row,
    kept_of,
    mean_heads,
    rounded,
)
from farspan.evaluation.evaluate import (
    MEMORY_ARGUMENTS,
    EvalSettings,
    engine_arguments,
    max_position,
    merge_options,
    model_path,
    open_engine,
    prompt_room,
)
from farspan.kernels.tuning import TILE_ROWS_SPAN_LEN
from farspan.metrics import read_selection
from farspan.model_shape import ModelInfo, read_model
from farspan.scheduler.rates import MEASURED, MEASURED_GPU, chunks_of
from farspan.tables import Tables
from farspan.tokenizer import load_tokenizer

AUDIT_CSV, HEADS_CSV = "audit.csv", "heads.csv"
WORKER = "farspan.evaluation.audit_worker.AuditMetrics"
GIVE_TEXTS = (
    "Give texts like those that the model will read: --text FILE [FILE ...], plain text in UTF-8, code or prose, a few "
    "times as long as the longest of --lengths"
)
DEFAULT_CHUNK = {"cpu": 2048, "cuda": 8192}
ROWS_PER_TOKENS = 32
"""One measured row for so many tokens of a chunk."""
MOST_ROWS = 256
MOST_ROWS_CPU = 64
TIMED_REPEATS = 3


@dataclass(frozen=True)
class AuditSettings:
    """What to audit; see `farspan audit --help` for each field."""

    model: str
    texts: tuple[Path, ...]
    lengths: tuple[int, ...]
    gammas: tuple[float, ...]
    out: Path
    prompts: int = 4
    """Most prompts of each length; fewer where the texts are shorter."""
    chunk: int | None = None
    """Prompt tokens in one engine step; DEFAULT_CHUNK if None."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `prefill`."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""


@dataclass(frozen=True)
class Probe:
    """One prompt in one way."""

    logprobs: torch.Tensor
    """[tokens] float64, nats, of the tokens of the prompt's second half."""
    greedy: torch.Tensor
    """[tokens] int64: the most likely token at each of these places."""
    heads: list[dict[str, Any]]
    """Rows of `read_selection`; none where the prompt was read densely, or nothing was measured."""


def run_audit(settings: AuditSettings) -> tuple[list[AuditRow], list[dict[str, Any]]]:
    """Audit a model: the rows of `audit.csv`, and those of `heads.csv`, both written into `settings.out`.

    Raises ConfigError, before a model is loaded, for what cannot be audited.
    """
    from vllm.platforms import current_platform

    device = "cpu" if current_platform.is_cpu() else "cuda"
    chunk = DEFAULT_CHUNK[device] if settings.chunk is None else settings.chunk
    prefill = check_settings(settings, chunk)
    prompts = cut_prompts(settings, read_tokens(settings.model, settings.texts))
    info = read_model(model_path(settings.model), overrides=overrides_of(settings.engine_args))
    make_folder(settings.out)
    tables = Tables(settings.out, fresh=True)
    rows: list[AuditRow] = []
    all_heads: list[dict[str, Any]] = []
    num_tokens = (1 + len(settings.gammas)) * sum(length * len(mine) for length, mine in prompts.items())
    print(
        f"{sum(map(len, prompts.values()))} prompts, each densely and with {len(settings.gammas)} gammas: "
        f"{num_tokens:,} tokens to read on {device}, in chunks of {chunk:,}.",
        flush=True,
    )

    from tqdm import tqdm

    with (
        audit_engine(settings, prefill, chunk, device) as llm,
        tqdm(total=num_tokens, desc="farspan audit", unit="token", unit_scale=True, smoothing=0.1) as progress,
    ):
        for length, mine in prompts.items():
            found: dict[float | None, list[Probe]] = {}
            for gamma in (None, *settings.gammas):
                progress.set_postfix_str(f"{length} {'dense' if gamma is None else f'gamma {gamma:g}'}")
                for tokens in mine:
                    found.setdefault(gamma, []).append(probe(llm, tokens, request_options(gamma)))
                    progress.update(length)
            speedups = speedups_of(llm, mine[0], settings, device)
            for gamma in settings.gammas:
                heads = mean_heads([each.heads for each in found[gamma]])
                row = audit_row(length, gamma, heads, found[None], found[gamma], speedups.get(gamma), info, chunk)
                named = [{**head, "length": length, "gamma": gamma} for head in heads]
                kept = [{name: head[name] for name in HEAD_COLUMNS} for head in named]
                tables.add(AUDIT_CSV, CSV_COLUMNS, [csv_row(row)])
                tables.add(HEADS_CSV, HEAD_COLUMNS, kept)
                rows.append(row)
                all_heads += kept
    return rows, all_heads


def audit_row(
    length: int,
    gamma: float,
    heads: Sequence[Mapping[str, Any]],
    dense: Sequence[Probe],
    sparse: Sequence[Probe],
    measured_speedup: float | None,
    info: ModelInfo,
    chunk: int,
) -> AuditRow:
    """What the prompts of one length say of one gamma. measured_speedup: None to predict it."""
    kept, change = kept_of(heads, gamma), change_of_probes(dense, sparse)
    source = "measured" if measured_speedup is not None else f"predicted for {MEASURED_GPU}"
    if measured_speedup is None:
        measured_speedup = predicted_speedup(info, length, max(chunk, DEFAULT_CHUNK["cuda"]), kept.density)
    return rounded(
        AuditRow(
            length=length,
            prompts=len(sparse),
            gamma=gamma,
            **asdict(kept),
            drift=change.drift,
            drift_error=change.drift_error,
            changed=change.changed,
            scored_tokens=change.num_tokens,
            speedup=measured_speedup,
            speed_source=source,
        )
    )


def change_of_probes(dense: Sequence[Probe], sparse: Sequence[Probe]) -> Any:
    """How the second halves of prompts change; a `Change`."""
    changed = [before.greedy != after.greedy for before, after in zip(dense, sparse, strict=True)]
    return change_of([each.logprobs for each in dense], [each.logprobs for each in sparse], changed)


def check_settings(settings: AuditSettings, chunk: int) -> FlexPrefill:
    """The engine's options. Raises ConfigError for what cannot be audited, with what to do."""
    path = model_path(settings.model)
    if not settings.texts:
        raise ConfigError(f"no texts. {GIVE_TEXTS}.")
    for name, values in (("lengths", settings.lengths), ("gammas", settings.gammas)):
        if not values:
            raise ConfigError(f"{name} is empty; name at least one, separated by commas")
    for gamma in settings.gammas:
        if not 0 < gamma <= 1:
            raise ConfigError(f"gamma={gamma}; allowed: numbers in (0, 1], such as 0.9,0.95,0.98")
    if settings.prompts < 1:
        raise ConfigError(f"prompts={settings.prompts}; it must be at least 1")
    if chunk < 1 or chunk % TILE_ROWS_SPAN_LEN:
        raise ConfigError(
            f"chunk={chunk}; allowed: multiples of {TILE_ROWS_SPAN_LEN}, for which blocks are chosen at once"
        )
    if settings.options.get("method", "flex") != "flex":
        raise ConfigError(f"options={settings.options}; an audit is of prefill method 'flex'. Leave method out.")
    for name in ("gamma", "min_seq_len", "min_chunk_len", "coverage_rows"):
        if name in settings.options:
            raise ConfigError(f"options has {name}, which an audit sets itself. Leave it out; gammas are --gammas.")
    if "worker_extension_cls" in settings.engine_args:
        raise ConfigError("engine_args has worker_extension_cls, which an audit needs for itself. Leave it out.")
    # Sparse at any length: what is asked is what it keeps, not whether it is faster.
    options = {"method": "flex", "gamma": max(settings.gammas), "min_seq_len": 0, "min_chunk_len": 0}
    parsed = parse_config({"prefill": merge_options(options, settings.options)}).prefill
    assert isinstance(parsed, FlexPrefill)
    least = shortest_length(parsed)
    most = max_position(path, settings.engine_args)
    for length in settings.lengths:
        if length < least:
            raise ConfigError(
                f"length={length}; allowed: at least {least} tokens, as shorter prompts read everything with "
                f"min_budget {parsed.min_budget}"
            )
        if most is not None and length > most:
            raise ConfigError(f"length={length}; allowed: at most {most} tokens, the model's max_position_embeddings")
    asked = settings.engine_args.get("max_model_len")
    if isinstance(asked, int) and asked < max(settings.lengths):
        raise ConfigError(
            f"length={max(settings.lengths)}; allowed: at most max_model_len={asked} of the engine arguments"
        )
    return parsed


def shortest_length(prefill: FlexPrefill) -> int:
    """Tokens of a prompt with two spans of query tiles that can leave blocks out."""
    first = -(-max(prefill.min_budget, 2 * TILE_ROWS_SPAN_LEN) // TILE_ROWS_SPAN_LEN) * TILE_ROWS_SPAN_LEN
    return first + 2 * TILE_ROWS_SPAN_LEN + 1


def overrides_of(engine_args: Mapping[str, Any]) -> dict[str, Any] | None:
    overrides = engine_args.get("hf_overrides")
    return overrides if isinstance(overrides, dict) else None


def read_tokens(model: str, texts: Sequence[Path]) -> tuple[list[int], list[int]]:
    """What a prompt begins with, and the tokens of all texts in order. Raises ConfigError for what is no text."""
    parts = []
    for path in texts:
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text in UTF-8. {GIVE_TEXTS}.") from error
    tokenizer = load_tokenizer(model_path(model))
    return list(tokenizer("").input_ids), list(tokenizer("\n\n".join(parts), add_special_tokens=False).input_ids)


def cut_prompts(settings: AuditSettings, text: tuple[list[int], list[int]]) -> dict[int, list[list[int]]]:
    """Prompts of every length, which do not overlap and are spread over the texts.

    One token of a length is left to the answer. Raises ConfigError where the texts are shorter than a prompt.
    """
    start, tokens = text
    prompts = {}
    for length in settings.lengths:
        taken = length - 1 - len(start)
        count = min(settings.prompts, len(tokens) // taken)
        if count == 0:
            raise ConfigError(
                f"the texts have {len(tokens):,} tokens of this model's together, fewer than a prompt of {length:,}. "
                f"{GIVE_TEXTS}; or name shorter lengths."
            )
        step = (len(tokens) - taken) // max(count - 1, 1)
        prompts[length] = [start + tokens[place * step : place * step + taken] for place in range(count)]
    return prompts


@contextmanager
def audit_engine(settings: AuditSettings, prefill: FlexPrefill, chunk: int, device: str) -> Iterator[Any]:
    """An engine that prefills by flex and measures; one prompt at a time."""
    import msgspec

    most_rows = MOST_ROWS_CPU if device == "cpu" else MOST_ROWS
    rows = max(1, min(most_rows, chunk // ROWS_PER_TOKENS))
    measured = msgspec.to_builtins(msgspec.structs.replace(prefill, coverage_rows=rows))
    if prefill.selection == "tile_rows":
        del measured["tau"]
    engine_args = {"worker_extension_cls": WORKER, "max_model_len": max(settings.lengths), "max_num_seqs": 1}
    if device == "cpu":
        engine_args |= {"dtype": "float32", "enforce_eager": True}
    model = EvalSettings(
        model=settings.model,
        tasks=(),
        lengths=settings.lengths,
        out=settings.out,
        count=1,
        chunk=chunk,
        engine_args=engine_args | settings.engine_args,
    )
    if not MEMORY_ARGUMENTS & model.engine_args.keys():
        # Log-probs of a whole chunk take memory that vLLM's profile does not see: KV of one prompt leaves room.
        model = replace(model, engine_args=prompt_room(model) | model.engine_args)
    with open_engine(settings.model, engine_arguments(model, {"prefill": measured})) as llm:
        llm.collective_rpc("farspan_audit", args=(True,))
        yield llm


def request_options(gamma: float | None) -> dict[str, Any]:
    """`extra_args` of a request; gamma None is dense."""
    return {"farspan.method": "dense"} if gamma is None else {"farspan.gamma": gamma}


def probe(llm: Any, tokens: list[int], extra_args: Mapping[str, Any]) -> Probe:
    """Read one prompt, and what was measured while it was read."""
    return replace(read_prompt(llm, tokens, extra_args), heads=read_selection(llm, reset=True))


def read_prompt(llm: Any, tokens: list[int], extra_args: Mapping[str, Any]) -> Probe:
    """Read one prompt with any engine; no heads."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False, extra_args=dict(extra_args)
    )
    (output,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    logprobs, greedy = [], []
    for place in range(len(tokens) // 2, len(tokens)):
        candidates = output.prompt_logprobs[place]
        logprobs.append(candidates[tokens[place]].logprob)
        greedy.append(next(token for token, each in candidates.items() if each.rank == 1))
    return Probe(torch.tensor(logprobs, dtype=torch.float64), torch.tensor(greedy), [])


def speedups_of(llm: Any, tokens: list[int], settings: AuditSettings, device: str) -> dict[float | None, float]:
    """Time to the first token of one prompt, dense over sparse, by gamma; nothing on a CPU, whose times say nothing."""
    if device == "cpu":
        return {}
    llm.collective_rpc("farspan_audit", args=(False,))
    seconds: dict[float | None, list[float]] = {}
    for repeat in range(1 + TIMED_REPEATS):
        for gamma in (None, *settings.gammas):
            elapsed = first_token_seconds(llm, tokens, request_options(gamma))
            if repeat > 0:  # the first compiles
                seconds.setdefault(gamma, []).append(elapsed)
    llm.collective_rpc("farspan_audit", args=(True,))
    median = {gamma: sorted(each)[len(each) // 2] for gamma, each in seconds.items()}
    return {gamma: median[None] / median[gamma] for gamma in settings.gammas}


def first_token_seconds(llm: Any, tokens: list[int], extra_args: Mapping[str, Any]) -> float:
    """From giving a prompt to the engine until its first token is back."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args=dict(extra_args))
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    return time.perf_counter() - started


def predicted_speedup(info: ModelInfo, length: int, chunk: int, density: float) -> float:
    """Dense over sparse time of a prompt on one H100, with the default crossover, by measured rates and a density."""
    shape = info.shape
    kernel = sparse_kernel((9, 0), shape.head_dim, torch.bfloat16, PREFERRED_PAGE_SIZE, has_turn=False)
    size = AttentionSize(shape.num_heads, shape.head_dim, kernel)
    bits = info.layer_bits or 16.0
    least_ms = shape.layer_params * bits / 8 / (MEASURED.weight_gbs * 1e6)
    linear_ms = dense_ms = sparse_ms = 0.0
    for start, chunk_len in chunks_of(length, chunk):
        linear_ms += max(2 * shape.active_params * chunk_len / (MEASURED.linear_tflops * 1e9), least_ms)
        dense, sparse = layer_ms(size, chunk_len, start + chunk_len, density)
        dense_ms += shape.num_layers * dense
        sparse_ms += shape.num_layers * (sparse if sparse_pays(size, chunk_len, start + chunk_len) else dense)
    speedup = (linear_ms + dense_ms) / (linear_ms + sparse_ms)
    assert math.isfinite(speedup)
    return speedup
