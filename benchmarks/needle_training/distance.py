"""Accuracy at distances beyond the trained ones, with ordinary and with shifted rotary positions (STRING).

    python -m benchmarks.needle_training.distance --out string_needle_distance.csv

The question starts `gap` positions after the haystack's end, so that the prompt has the distances of a prompt with
`gap` more tokens, but needs no more computation. It does not have that prompt's distractors: this measures only
positions. No two tokens of the haystack are as far apart as any shift, so its keys and values serve every gap.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from farspan.command import make_folder, run_command
from farspan.engine_ext.errors import ConfigError
from farspan.needle import model_dir
from farspan.needle.network import NeedleNet, load_network, rotate
from farspan.needle.tasks import MIN_LENGTH, make_sample
from farspan.needle.tokenizer import build_tokenizer
from farspan.tables import append_rows, write_rows

PROGRAM = "python -m benchmarks.needle_training.distance"
COLUMNS = ("task", "length", "gap", "shift", "window", "seed", "count", "accuracy")
TASKS = ("niah_single", "niah_multivalue")
# None, the advised range (a quarter to four tenths of the trained length of 131,072 tokens), all of it, and more.
SHIFTS = (0, 32768, 43253, 52428, 131072, 524288)
WINDOWS = (128, 512)
GAPS = tuple(length * 1024 for length in (0, 64, 126, 160, 192, 256, 384, 512, 1024))


@dataclass(frozen=True)
class Haystack:
    """The keys and values of a prompt's first tokens."""

    keys: list[torch.Tensor]
    """Of each layer, [kv_heads, tokens, head_dim], rotated to positions 0, 1, …"""
    values: list[torch.Tensor]
    """Of each layer, as the keys."""

    @property
    def num_tokens(self) -> int:
        """Length in tokens."""
        return self.keys[0].shape[1]


def run_layers(
    net: NeedleNet, tokens: torch.Tensor, positions: torch.Tensor, past: Haystack | None, shift: int, window: int
) -> tuple[torch.Tensor, Haystack]:
    """Final hidden states [num_tokens, hidden] of tokens after a haystack, and all keys and values.

    tokens, positions: [num_tokens] int64. shift: distances of so many positions and more are shortened to
    `distance - shift + window`; 0 for none.
    """
    head_dim = net.shape.head_dim
    group = net.shape.num_attention_heads // net.shape.num_key_value_heads
    before = 0 if past is None else past.num_tokens
    key_positions = torch.cat([torch.arange(before), positions])
    distance = positions[:, None] - key_positions
    cos, sin = (each[0] for each in net.rotary(positions[None]))
    far_cos, far_sin = (each[0] for each in net.rotary(positions[None] - shift + window))
    x = F.embedding(tokens, net.model.embed_tokens.weight)
    keys, values = [], []
    for index, layer in enumerate(net.layers):
        attn, mlp = layer.self_attn, layer.mlp
        h = layer.input_layernorm(x)
        q, k, v = (
            projection(h).unflatten(1, (-1, head_dim)).transpose(0, 1)
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        k = rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past.keys[index], k], dim=1), torch.cat([past.values[index], v], dim=1)
        keys.append(k)
        values.append(v)
        k, v = (each.repeat_interleave(group, dim=0) for each in (k, v))
        logits = rotate(q, cos, sin) @ k.mT
        if shift:
            logits = torch.where(distance >= shift, rotate(q, far_cos, far_sin) @ k.mT, logits)
        weights = (logits * head_dim**-0.5).masked_fill(distance < 0, -torch.inf).softmax(dim=-1)
        x = x + attn.o_proj((weights @ v).transpose(0, 1).flatten(1))
        h = layer.post_attention_layernorm(x)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return net.model.norm(x), Haystack(keys, values)


def variants() -> Iterator[tuple[int, int]]:
    """Every shift and window, ordinary positions first."""
    for shift in SHIFTS:
        for window in WINDOWS if shift else (0,):
            yield shift, window


@torch.no_grad()
def right_answers(net: NeedleNet, task: str, length: int, seed: int, depth: float) -> dict[tuple[int, int, int], bool]:
    """Whether the model would write the whole completion, by gap, shift and window. net: in float32."""
    tokenizer = build_tokenizer()
    sample = make_sample(task, length, seed, depth)
    split = len(tokenizer.encode(sample.prompt[: sample.prompt.rindex("question")]).ids)
    prompt = tokenizer.encode(sample.prompt).ids
    answer = torch.tensor(tokenizer.encode(sample.completion, add_special_tokens=False).ids)
    tokens = torch.cat([torch.tensor(prompt), answer])
    _, haystack = run_layers(net, tokens[:split], torch.arange(split), None, 0, 0)
    found = {}
    for gap in GAPS:
        positions = torch.arange(split, len(tokens)) + gap
        for shift, window in variants():
            hidden, _ = run_layers(net, tokens[split:], positions, haystack, shift, window)
            predicted = net.logits(hidden[-len(answer) - 1 : -1]).argmax(dim=-1)
            found[gap, shift, window] = bool((predicted == answer).all())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--model", type=Path, default=model_dir())
    parser.add_argument("--length", type=int, default=1024, help="prompt tokens, without the gap")
    parser.add_argument("--count", type=int, default=50, help="prompts of each task; depths go evenly from 0 to 1")
    parser.add_argument("--seed", type=int, default=20_000, help="of the first prompt")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    arguments = parser.parse_args()
    return run_command(PROGRAM, lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Answer the questions and write the table. Raises ConfigError for a number out of range."""
    if arguments.length < MIN_LENGTH or arguments.count < 1:
        raise ConfigError(f"length is at least {MIN_LENGTH} tokens, count at least 1")
    make_folder(arguments.out.parent)
    net = load_network(arguments.model)
    write_rows(arguments.out, COLUMNS, [])
    for task in TASKS:
        answers = [
            right_answers(net, task, arguments.length, arguments.seed + index, index / max(1, arguments.count - 1))
            for index in range(arguments.count)
        ]
        rows = []
        for gap, shift, window in answers[0]:
            accuracy = sum(each[gap, shift, window] for each in answers) / arguments.count
            row = (task, arguments.length, gap, shift, window, arguments.seed, arguments.count, round(accuracy, 4))
            rows.append(dict(zip(COLUMNS, row, strict=True)))
        append_rows(arguments.out, COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(main())
