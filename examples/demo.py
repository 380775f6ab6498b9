"""`make demo`: one long question, vLLM's own attention next to farspan's, on whatever machine this is.

Every engine gets the same prompts: a question whose answers hide in a long prompt, asked of the small bundled model,
and files of this repository to be continued. The engines run one behind the other in a child process, whose log is
shown only if it fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH = 130944
"""Tokens of the longest question, which leaves the bundled model room for the answer."""
CHUNK = 2048
"""Prompt tokens in one engine step, and so the steps of the progress bar."""
CONTINUED = ("README.md", "docs/design.md", "CONTRIBUTING.md", "kernels/reference.py")
ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve each other where cores are shared
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
STOCK = "vLLM's own"
ENGINES: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "farspan dense": {"prefill": {"method": "dense"}},
    "farspan flex": {"prefill": {"method": "flex", "gamma": 0.95}},
}
EXACT = ("farspan dense",)


@dataclass(frozen=True)
class Prompt:
    """What every engine is asked."""

    title: str
    text: str
    num_tokens: int
    max_tokens: int
    answers: list[str]
    """Words that a right answer contains; empty where there is nothing to be right about."""


@dataclass(frozen=True)
class Answer:
    """What an engine made of a prompt."""

    prompt_tokens: int
    text: str
    token_ids: list[int]
    ttft_s: float
    tokens_per_s: float


def make_prompts(model_dir: Path, length: int) -> list[Prompt]:
    """Make the question, `length` tokens long, and the text to be continued, half as long."""
    from farspan.needle.tasks import make_sample
    from transformers import AutoTokenizer

    sample = make_sample("niah_multiquery", length, seed=7)
    question = Prompt("A question", sample.prompt, length, sample.max_new_tokens, list(sample.answers))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    files = [path for path in map(ROOT.joinpath, CONTINUED) if path.exists()]
    text = "\n".join(path.read_text() for path in files)
    token_ids = tokenizer.encode(text)[1 : length // 2]
    names = ", ".join(str(path.relative_to(ROOT)) for path in files)
    return [question, Prompt(f"Text of this repository ({names})", tokenizer.decode(token_ids), len(token_ids), 32, [])]


def start_engine(model_dir: Path, options: dict[str, Any] | None, max_len: int) -> Any:
    """Start vLLM on the model; farspan with these options, or vLLM's own backend if None."""
    import torch
    from vllm import LLM

    arguments: dict[str, Any] = {"max_model_len": max_len, "max_num_batched_tokens": CHUNK, "max_num_seqs": 4}
    arguments |= {"enable_prefix_caching": False, "enforce_eager": True, "seed": 0}
    if not torch.cuda.is_available():
        arguments["dtype"] = "float32"
    else:
        arguments["gpu_memory_utilization"] = 0.3
    if options is not None:
        arguments |= {"attention_backend": "CUSTOM", "additional_config": {"farspan": options}}
    return LLM(str(model_dir), **arguments)


def ask(llm: Any, prompt: Prompt, name: str) -> Answer:
    """Send one prompt, greedily; prints `+N` for every N tokens done, for the parent's progress bar."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    parameters = SamplingParams(max_tokens=prompt.max_tokens, temperature=0.0, ignore_eos=not prompt.answers)
    started = time.perf_counter()
    engine.add_request(name, {"prompt": prompt.text}, parameters)
    arrivals: list[float] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if not outputs:
            print(f"+{CHUNK}", flush=True)
        for output in outputs:
            completion = output.outputs[0]
            arrivals += [time.perf_counter()] * (len(completion.token_ids) - len(arrivals))
            print("+1", flush=True)
    decode_s = arrivals[-1] - arrivals[0]
    return Answer(
        prompt_tokens=len(output.prompt_token_ids),
        text=completion.text.strip(),
        token_ids=list(completion.token_ids),
        ttft_s=arrivals[0] - started,
        tokens_per_s=(len(arrivals) - 1) / decode_s if decode_s > 0 else 0.0,
    )


def serve_parent(job_path: Path) -> None:
    """Be the engines' process: read the job, answer its prompts with each engine, write the answers beside it."""
    job = json.loads(job_path.read_text())
    prompts = [Prompt(**prompt) for prompt in job["prompts"]]
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, options in job["engines"].items():
        print(f"starting {name}", flush=True)
        llm = start_engine(Path(job["model_dir"]), options, job["max_len"])
        ask(llm, Prompt("", prompts[0].text[:2000], 0, 2, []), "warm-up")
        print("ready", flush=True)
        answers[name] = [asdict(ask(llm, prompt, str(index))) for index, prompt in enumerate(prompts)]
        del llm
    job_path.with_suffix(".answers").write_text(json.dumps(answers))


def run_engines(model_dir: Path, prompts: list[Prompt], max_len: int) -> dict[str, list[Answer]]:
    """Run all engines in a child process, behind a progress bar; returns each one's answers, one a prompt."""
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as scratch:
        job_path, log_path = Path(scratch, "job"), Path(scratch, "log")
        job = {"engines": ENGINES, "model_dir": str(model_dir), "max_len": max_len}
        job_path.write_text(json.dumps(job | {"prompts": [asdict(prompt) for prompt in prompts]}))
        total = len(ENGINES) * sum(prompt.num_tokens + prompt.max_tokens for prompt in prompts)
        # No bar where the output is no terminal.
        bar = tqdm(total=total, desc="starting vLLM", unit="token", leave=False, disable=None)
        with log_path.open("w") as log, bar:
            process = subprocess.Popen(
                [sys.executable, __file__, "--job", str(job_path)],
                env=os.environ | ENGINE_ENV, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
            try:
                name = follow(process, bar)
            except BaseException:
                process.kill()
                raise
        if process.wait() != 0:
            sys.exit(f"The engine {name!r} failed. The end of its log:\n{log_path.read_text()[-3000:]}")
        raw = json.loads(job_path.with_suffix(".answers").read_text())
    return {name: [Answer(**answer) for answer in each] for name, each in raw.items()}


def follow(process: "subprocess.Popen[str]", bar: Any) -> str:
    """Show the child's progress until it closes its output; returns the last engine that it started."""
    assert process.stdout is not None
    name, is_ready = "", False
    for line in process.stdout:
        if line.startswith("starting "):
            name, is_ready = line.removeprefix("starting ").strip(), False
            bar.set_description(f"starting {name}")
        elif line == "ready\n":
            is_ready = True
            bar.set_description(f"asking {name}")
        elif is_ready and re.fullmatch(r"\+\d+\n", line):
            bar.update(min(int(line), bar.total - bar.n))
    return name


def show_needles(prompt: Prompt) -> None:
    """Print where the answers hide, and the question."""
    places = [re.search(rf"[^.]*\b{re.escape(answer)}\b[^.]*\.", prompt.text) for answer in prompt.answers]
    for found in sorted(filter(None, places), key=lambda place: place.start()):
        print(f"  at {found.start() / len(prompt.text):4.0%}: “{found.group().strip()}”")
    print(f"  asked at the end: “{prompt.text[prompt.text.rfind('question') :].strip()}”")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def report(prompt: Prompt, answers: dict[str, Answer]) -> None:
    """Print one prompt's comparison."""
    stock = answers[STOCK]
    print(f"\n{prompt.title}: {stock.prompt_tokens} tokens")
    if prompt.answers:
        show_needles(prompt)
    header = ["attention", "first token", "tokens/s", "same tokens", "right" if prompt.answers else "", "answer"]
    rows = [header]
    for name, answer in answers.items():
        right = sum(bool(re.search(rf"\b{re.escape(word)}\b", answer.text)) for word in prompt.answers)
        same = "" if name == STOCK else ("yes" if answer.token_ids == stock.token_ids else "no")
        score = f"{right} of {len(prompt.answers)}" if prompt.answers else ""
        text = answer.text if len(answer.text) <= 60 else answer.text[:59] + "…"
        rows.append([name, f"{answer.ttft_s:9.2f} s", f"{answer.tokens_per_s:8.1f}", same, score, text])
    print(table(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask one long question with vLLM's own attention and with farspan's.")
    parser.add_argument("--length", type=int, default=12288, help="tokens of the question's prompt (default: 12288)")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        serve_parent(arguments.job)
        return 0
    from farspan.command import run_command

    return run_command("examples/demo.py", lambda: compare(arguments.length))


def compare(length: int) -> None:
    """Ask all engines and print their answers. Raises ConfigError for a length that the model cannot have."""
    from farspan.engine_ext.errors import ConfigError
    from farspan.needle import model_dir
    from farspan.needle.tasks import MIN_LENGTH

    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ConfigError(f"length={length}; prompts have {MIN_LENGTH} to {MAX_LENGTH} tokens")
    started = time.monotonic()
    print(f"Making a question of {length} tokens and starting vLLM …", flush=True)
    prompts = make_prompts(model_dir(), length)
    max_len = length + 2 * max(prompt.max_tokens for prompt in prompts)
    answers = run_engines(model_dir(), prompts, max_len)
    for index, prompt in enumerate(prompts):
        report(prompt, {name: each[index] for name, each in answers.items()})
    print(f"\n{time.monotonic() - started:.0f} s in all.")
    tokens = {name: [answer.token_ids for answer in each] for name, each in answers.items()}
    differing = [name for name in EXACT if tokens[name] != tokens[STOCK]]
    if differing:
        sys.exit(f"Exact attention gave other tokens than {STOCK}: {', '.join(differing)}")


if __name__ == "__main__":
    sys.exit(main())
