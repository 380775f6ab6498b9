"""`farspan star`: one question about a long context over several hosts, with a bar of blocks; or a server."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.star.shard import StarShard
from farspan.star.llm import StarLLM
from farspan.star.output import Progress, StarOutput

BAR_WIDTH = 30


@dataclass(frozen=True)
class StarCommand:
    """What the command line says."""

    model: str
    hosts: int
    context: Path | None
    """A text file; None with the bundled model, which then gets a generated question."""
    query: str | None
    length: int
    max_tokens: int
    temperature: float
    block_len: int | None
    anchor_len: int | None
    timeout_s: float
    address: str | None
    strategy: Any
    options: dict[str, Any]
    engine: dict[str, Any]
    listen: tuple[str, int] | None = None
    """Address and port of a server; None to ask one question."""
    anchor: Any = "auto"
    visibility: Any = "star"
    graphs: bool = False
    start_timeout_s: float = 900.0


def run_star(command: StarCommand) -> int:
    """Ask, show how far the hosts are, print the answer and where the time went. Raises FarspanError."""
    engine = dict(command.engine)
    for name in sorted(StarLLM.__init__.__annotations__.keys() & engine.keys() - {"engine", "env"}):
        raise ConfigError(
            f"--engine-args has {name!r}; allowed: arguments of vllm.LLM that the command has no option for. Use the "
            "option, which farspan star --help names."
        )
    if command.model == "needle":
        import torch

        if not torch.cuda.is_available():
            engine.setdefault("dtype", "float32")
            # Compiling takes minutes there, and one short answer no time.
            engine.setdefault("enforce_eager", True)
        engine.setdefault("max_model_len", command.length + 2 * command.max_tokens)
    if command.listen is None:
        context, query, expected = read_question(command)
    params = sampling_of(command)
    bar = Bar(sys.stderr)
    print(f"starting {command.hosts} host{'s' if command.hosts > 1 else ''} …", file=sys.stderr, flush=True)
    with StarLLM(
        command.model,
        command.hosts,
        block_len=command.block_len,
        anchor_len=command.anchor_len,
        anchor=command.anchor,
        visibility=command.visibility,
        timeout_s=command.timeout_s,
        start_timeout_s=command.start_timeout_s,
        graphs=command.graphs,
        address=command.address,
        strategy=command.strategy,
        options=command.options,
        **engine,
    ) as llm:
        if command.listen is not None:
            from farspan.star.serve import serve

            serve(llm, command.model, *command.listen)
            return 0
        output = llm.generate(context, query, params, on_progress=bar.show)
        bar.end()
    print(output.text.strip())
    if expected:
        print(f"expected: {expected}")
    print(describe(output), file=sys.stderr)
    return 0


def sampling_of(command: StarCommand) -> Any:
    """VLLM's parameters. Raises ConfigError for those that vLLM refuses."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        return SamplingParams(max_tokens=command.max_tokens, temperature=command.temperature)
    except (ValueError, VLLMValidationError) as error:
        raise ConfigError(f"vLLM refuses --max-tokens or --temperature: {error}") from error


def read_question(command: StarCommand) -> tuple[str, str | None, str]:
    """Context, query (None where the context holds the marker) and, of a generated question, the answer."""
    if command.context is not None:
        try:
            return command.context.read_text(), command.query, ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--context {command.context}: {error}. Give a text file in UTF-8.") from error
    if command.model != "needle":
        raise ConfigError("--context is missing; allowed: leaving it out with --model needle alone. Name a text file.")
    from farspan.needle.tasks import MIN_LENGTH, make_sample

    if command.length < MIN_LENGTH:
        raise ConfigError(f"--length {command.length}; prompts have at least {MIN_LENGTH} tokens. Use 2048.")
    sample = make_sample("niah_single", command.length, seed=1)
    context, question = split_question(sample.prompt)
    return context, question, " ".join(sample.answers)


def split_question(prompt: str) -> tuple[str, str]:
    """Context and query of a generated prompt: its question comes last."""
    at = prompt.rindex("question")
    return prompt[:at].rstrip(), prompt[at:]


class Bar:
    """How many blocks are read, on one line of a terminal; elsewhere a line a change."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.shown = ""

    def show(self, progress: Progress) -> None:
        """Draw what changed."""
        if progress.phase == "phase 1":
            filled = BAR_WIDTH * progress.num_blocks_done // max(progress.num_blocks, 1)
            bar = "█" * filled + "░" * (BAR_WIDTH - filled)
            text = f"phase 1 {bar} {progress.num_blocks_done}/{progress.num_blocks} blocks"
        else:
            text = f"{progress.phase}: {len(progress.token_ids)} tokens"
        if text == self.shown:
            return
        self.shown = text
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[2K{text}")
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the line."""
        if self.shown and self.stream.isatty():
            self.stream.write("\r\x1b[2K")
            self.stream.flush()


def describe(output: StarOutput) -> str:
    """Where the time of a request went, in two lines."""
    times = output.times
    per_token = sum(times.token_s) / len(times.token_s) * 1e3 if times.token_s else 0.0
    first = f"first token after {times.first_token_s:.2f} s, then {per_token:.1f} ms a token"
    if output.shards is None:
        return f"exact attention on one host; {first}"
    blocks = ", ".join(
        f"host {shard.rank}: {shard.num_blocks} block{'s' if shard.num_blocks != 1 else ''} in {seconds:.2f} s"
        for shard, seconds in zip(output.shards, times.host_s, strict=True)
    )
    shard = output.shards[0]
    cut = "parts that see all before them"
    if isinstance(shard, StarShard):
        cut = f"blocks of {shard.block_len}, anchor {shard.anchor_len}"
    waited = f" ({max(times.key_exchange_s):.2f} s of it until keys came)" if any(times.key_exchange_s) else ""
    return (
        f"{shard.context_len} tokens of context in {cut}; {blocks}\n"
        f"phase 1 took {times.phase_1_s:.2f} s{waited}; {first}; {times.exchanged_bytes / 2**20:.2f} MiB exchanged"
    )
