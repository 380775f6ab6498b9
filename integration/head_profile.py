"""`farspan profile`: which KV heads of a model look far back, from its own forward pass over texts."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from farspan.command import one_line
from farspan.engine_ext.errors import ConfigError, UnsupportedModelError
from farspan.engine_ext.head_profile import FORMAT, HeadProfile
from farspan.tokenizer import load_tokenizer

NUM_ROWS = 64
"""Queries of each text on which attention is measured, evenly spread over its second half."""
RETRIEVAL_SCORE = 0.1
"""From here on a head counts as one that looks far back, in what is printed."""


@dataclass(frozen=True)
class ProfileSettings:
    """What `farspan profile` was asked."""

    model: str
    texts: tuple[Path, ...]
    out: Path
    length: int
    """Tokens of each text, at most."""
    sink_tokens: int
    recent_tokens: int
    device: str


def add_profile_command(subcommands: Any) -> None:
    """Add `profile` to the subcommands of `farspan`."""
    parser = subcommands.add_parser(
        "profile",
        help="which KV heads look far back, for offload.head_profile",
        description="Run a model over texts like those it will serve, and measure for every KV head how much attention "
        "goes neither to the first tokens nor to the last ones. Writes a file for the option offload.head_profile: the "
        "heads that look far back then stay in GPU memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="`needle` (bundled), a folder with config.json, or a Hugging Face name")
    add("--text", type=Path, nargs="+", required=True, metavar="FILE", help="texts, each read from its start")
    add("--out", type=Path, default=Path("head-profile.json"), help="file to write")
    add("--length", type=int, default=8192, metavar="N", help="tokens of each text, at most")
    add("--sink-tokens", type=int, default=128, metavar="N", help="first tokens that do not count")
    add("--recent-tokens", type=int, default=1024, metavar="N", help="tokens before a query that do not count")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.set_defaults(run=run_profile)


def run_profile(arguments: argparse.Namespace) -> int:
    """Measure, print and write a profile. Raises FarspanError or OSError."""
    settings = ProfileSettings(
        model=arguments.model,
        texts=tuple(arguments.text),
        out=arguments.out,
        length=arguments.length,
        sink_tokens=arguments.sink_tokens,
        recent_tokens=arguments.recent_tokens,
        device=arguments.device,
    )
    check_settings(settings)
    started = time.monotonic()
    profile = profile_model(settings)
    settings.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1))
    print(format_profile(profile))
    print(f"written: {settings.out} ({time.monotonic() - started:.0f} s)")
    return 0


def check_settings(settings: ProfileSettings) -> None:
    """Raise ConfigError for numbers that leave nothing to measure, and for a place that cannot be written to."""
    for name in ("length", "sink_tokens", "recent_tokens"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1.")
    if settings.length <= 2 * needed_tokens(settings):
        raise ConfigError(
            f"--length is {settings.length}; it must be more than {2 * needed_tokens(settings)}, twice --sink-tokens "
            "and --recent-tokens together, so that there are tokens between them. Raise it, or lower the others."
        )
    if settings.out.is_dir() or not settings.out.resolve().parent.is_dir():
        raise ConfigError(f"--out {settings.out} is no file in a folder that exists. Make the folder, or name a file.")


def needed_tokens(settings: ProfileSettings) -> int:
    return settings.sink_tokens + settings.recent_tokens


def profile_model(settings: ProfileSettings) -> HeadProfile:
    """Run the model over the texts. Raises ConfigError or UnsupportedModelError."""
    import torch
    from farspan.needle import local_name
    from transformers import AutoConfig, AutoModelForCausalLM

    name = local_name(settings.model)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device is {settings.device!r}, which is not there ({one_line(str(error))}).") from error
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"MODEL is {settings.model!r}, which cannot be read ({one_line(str(error))[:200]}). Give a folder with "
            "config.json and a tokenizer, a name on the model hub, or needle."
        ) from error
    tokenizer = load_tokenizer(name)
    length = min(settings.length, getattr(config.get_text_config(), "max_position_embeddings", settings.length))
    texts = []
    for file in settings.texts:
        try:
            # Some four characters a token; more of a long file need not be read.
            with file.open(encoding="utf-8", errors="replace") as opened:
                text = opened.read(16 * length)
        except OSError as error:
            raise ConfigError(f"--text {file} cannot be read ({error.strerror}).") from error
        tokens = tokenizer(text)["input_ids"][:length]
        if len(tokens) <= 2 * needed_tokens(settings):
            raise ConfigError(
                f"--text {file} has {len(tokens)} tokens for this model; more than {2 * needed_tokens(settings)} are "
                "needed, twice --sink-tokens and --recent-tokens together. Give a longer text, or lower those."
            )
        texts.append(tokens)
    # On a CPU few operations know 16 bits, and none is faster by them.
    dtype = torch.float32 if device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    sums: dict[int, Any] = {}
    with torch.inference_mode(), measuring(sums, settings):
        for tokens in texts:
            model.get_decoder()(torch.tensor([tokens], device=device), use_cache=False)
    if sorted(sums) != list(range(len(sums))) or not sums or len(sums) != config.get_text_config().num_hidden_layers:
        raise UnsupportedModelError(
            f"{settings.model}: attention was seen in {len(sums)} of {config.get_text_config().num_hidden_layers} "
            "layers; farspan supports decoders with plain GQA in every layer."
        )
    scores = tuple(tuple(round(score, 6) for score in (sums[layer] / len(texts)).tolist()) for layer in sorted(sums))
    return HeadProfile(
        format=FORMAT,
        model=settings.model,
        num_tokens=max(map(len, texts)),
        sink_tokens=settings.sink_tokens,
        recent_tokens=settings.recent_tokens,
        scores=scores,
    )


@contextmanager
def measuring(sums: dict[int, Any], settings: ProfileSettings) -> Iterator[None]:
    """Add the scores of each layer's KV heads to `sums` as the layers of a transformers model run."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, query: Any, key: Any, *rest: Any, **options: Any) -> Any:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        score = far_mass(query[0], key[0], scale, settings.sink_tokens, settings.recent_tokens)
        sums[module.layer_idx] = sums.get(module.layer_idx, 0) + score.cpu()
        return stock(module, query, key, *rest, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = stock


def far_mass(query: Any, key: Any, scale: float, sink_tokens: int, recent_tokens: int) -> Any:
    """Attention mass between the first and the last tokens: [num_kv_heads] float32, of each group's farthest head.

    query: [num_q_heads, num_tokens, head_dim]; key: [num_kv_heads, num_tokens, head_dim].
    """
    import torch

    num_kv_heads, num_tokens, _ = key.shape
    rows = torch.linspace(num_tokens // 2, num_tokens - 1, NUM_ROWS, device=key.device).long().unique()
    heads = query[:, rows].float().unflatten(0, (num_kv_heads, -1))
    masses = torch.zeros(heads.shape[:2], device=key.device)
    position = torch.arange(num_tokens, device=key.device)
    is_seen = position <= rows[:, None]
    is_far = (position >= sink_tokens) & (position <= rows[:, None] - recent_tokens)
    for head in range(num_kv_heads):
        logits = (heads[head] @ key[head].float().T * scale).masked_fill(~is_seen, float("-inf"))
        masses[head] = (logits.softmax(-1) * is_far).sum(-1).mean(-1)
    return masses.amax(1)


def format_profile(profile: HeadProfile) -> str:
    """A few lines for the reader."""
    scores = [(score, layer, head) for layer, row in enumerate(profile.scores) for head, score in enumerate(row)]
    far = [each for each in scores if each[0] >= RETRIEVAL_SCORE]
    lines = [
        f"{profile.model}: {len(profile.scores)} layers with {len(profile.scores[0])} KV heads, texts of up to "
        f"{profile.num_tokens:,} tokens",
        f"{len(far)} of {len(scores)} KV heads put {RETRIEVAL_SCORE:.0%} or more of their attention neither on the "
        f"first {profile.sink_tokens} nor on the last {profile.recent_tokens} tokens",
        "Heads that look farthest (layer.head: share):",
        "  " + ", ".join(f"{layer}.{head}: {score:.2f}" for score, layer, head in sorted(scores, reverse=True)[:8]),
    ]
    return "\n".join(lines)
