"""What each attention head of a model looks at: `python -m farspan.needle.heads --model DIR --out heads.csv`.

The report averages exact attention over sampled blocks of 128 queries, of one prompt per task:

- local_mass: on the last 128 tokens up to the query, without the first token; sink_mass: on the first token;
- retrieval_mass: from the tokens that predict an answer, on the needle's words up to two away from the answer;
- density_95: smallest share of the causal 128 × 128 blocks that holds 95 % of the mass of a block of queries.

A head's kind is the first of retrieval, local and sink whose mass is above one half, else mixed.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from farspan.command import device, integers, make_folder, run_command
from farspan.engine_ext.errors import ConfigError
from farspan.tables import write_rows

from .network import LOCAL_WINDOW, NeedleNet, load_network, rotate
from .tasks import MIN_LENGTH, make_sample
from .tokenizer import BOS, build_tokenizer

PROGRAM = "python -m farspan.needle.heads"
BLOCK = 128
COLUMNS = (
    "length", "seed", "layer", "head", "kind", "local_mass", "sink_mass", "retrieval_mass", "density_95",
)  # fmt: skip
MEASURES = COLUMNS[-4:]
TASKS = ("niah_multikey_2", "niah_multiquery", "variable_tracking")


def head_report(net: NeedleNet, length: int, seed: int, num_query_blocks: int = 8) -> list[dict]:
    """Rows of `COLUMNS`, one per head, averaged over one prompt of each of `TASKS`. length: tokens per prompt."""
    parts = [_measure(net, *_prompt(task, length, seed), num_query_blocks) for task in TASKS]
    measures = torch.stack(parts).mean(dim=0)
    rows = []
    for layer, heads in enumerate(measures.tolist()):
        for head, (local, sink, retrieval, density) in enumerate(heads):
            values = (round(value, 4) for value in (local, sink, retrieval, density))
            kind = _kind(local, sink, retrieval)
            rows.append(dict(zip(COLUMNS, (length, seed, layer, head, kind, *values), strict=True)))
    return rows


@torch.no_grad()
def _measure(net: NeedleNet, tokens: list[int], answers: list[tuple[int, int]], num_query_blocks: int):
    """[layers, heads, 4] in the order of `MEASURES`. answers: pairs of the predicting and the needle's position."""
    device = next(net.parameters()).device
    ids = torch.tensor(tokens, device=device)[None]
    num_tokens = ids.shape[1]
    cos, sin = net.rotary(torch.arange(num_tokens, device=device)[None])
    shape = net.shape
    group_size = shape.num_attention_heads // shape.num_key_value_heads
    # Query blocks spread over the prompt's second half, the last block included.
    last = num_tokens // BLOCK - 1
    blocks = sorted({round(last * (1 - 0.5 * step / num_query_blocks)) for step in range(num_query_blocks)})
    x = F.embedding(ids, net.model.embed_tokens.weight.to(net.dtype))
    report = []
    for layer in net.layers:
        h = layer.input_layernorm(x)
        attn = layer.self_attn
        q, k = (
            F.linear(h, projection.weight.to(h.dtype)).view(1, num_tokens, -1, shape.head_dim).transpose(1, 2)
            for projection in (attn.q_proj, attn.k_proj)
        )
        q, k = rotate(q, cos, sin)[0], rotate(k, cos, sin)[0]
        k = k.repeat_interleave(group_size, dim=0)
        sums = torch.zeros(shape.num_attention_heads, 3, device=device)
        for block in blocks:
            places = torch.arange(block * BLOCK, (block + 1) * BLOCK, device=device)
            mass = _attention(q, k, places)
            key = torch.arange(num_tokens, device=device)
            is_local = (key > places[:, None] - LOCAL_WINDOW) & (key > 0)
            sums[:, 0] += (mass * is_local).sum(dim=-1).mean(dim=-1)
            sums[:, 1] += mass[..., 0].mean(dim=-1)
            sums[:, 2] += _density(mass.mean(dim=1), block)
        sums /= len(blocks)
        asking, needles = (torch.tensor(column, device=device) for column in zip(*answers, strict=True))
        mass = _attention(q, k, asking)
        span = needles[:, None] + torch.arange(-2, 3, device=device)
        on_needle = mass.gather(2, span.expand(len(mass), -1, -1)).sum(dim=-1).mean(dim=-1)
        report.append(torch.stack((sums[:, 0], sums[:, 1], on_needle, sums[:, 2]), dim=-1).cpu())
        x, _ = layer(x, cos, sin)
    return torch.stack(report)


def _attention(q, k, places):
    """Exact causal attention of the queries at `places`: [heads, len(places), tokens], float32."""
    scores = q[:, places].float() @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5
    key = torch.arange(k.shape[1], device=k.device)
    return scores.masked_fill(key > places[:, None], -torch.inf).softmax(dim=-1)


def _density(mass, block: int):
    """Smallest share of causal key blocks with 95 % of `mass` [heads, tokens] of one query block: [heads]."""
    num_heads, num_tokens = mass.shape
    padded = F.pad(mass, (0, -num_tokens % BLOCK)).view(num_heads, -1, BLOCK).sum(dim=-1)[:, : block + 1]
    kept = padded.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    num_needed = (kept < 0.95 * padded.sum(dim=-1, keepdim=True)).sum(dim=-1) + 1
    return num_needed / (block + 1)


def _prompt(task: str, length: int, seed: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of prompt and completion, and per answer the position that predicts it and that in the haystack."""
    tokenizer = build_tokenizer()
    sample = make_sample(task, length, seed)
    prompt = tokenizer.encode(sample.prompt).ids
    completion = tokenizer.encode(sample.completion, add_special_tokens=False).ids
    tokens = prompt + completion
    assert tokens[0] == tokenizer.token_to_id(BOS)
    answers = []
    for answer in sample.answers:
        token = tokenizer.token_to_id(answer)
        place = len(prompt) + completion.index(token)
        before = tokens[place - 2 : place]
        # The two words before the answer are the same in the needle.
        found = [i for i in range(2, len(prompt)) if tokens[i] == token and tokens[i - 2 : i] == before]
        answers.append((place - 1, found[0]))
    return tokens, answers


def _kind(local: float, sink: float, retrieval: float) -> str:
    if retrieval > 0.5:
        return "retrieval"
    if local > 0.5:
        return "local"
    if sink > 0.5:
        return "sink"
    return "mixed"


def main() -> int:
    """Report on a needle model folder; returns the exit status."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--lengths", type=integers, default="8192", help="prompt tokens, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    return run_command(PROGRAM, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write the report and print it. Raises ConfigError for a prompt that is too short."""
    if min(args.lengths, default=0) < MIN_LENGTH:
        raise ConfigError(f"lengths={list(args.lengths)}; prompts have at least {MIN_LENGTH} tokens")
    make_folder(args.out.parent)
    # In bf16 on a GPU the layers' own attention needs no matrix of all scores, which beyond 32K tokens would not fit.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    net = load_network(args.model, args.device, dtype)
    rows = [row for length in args.lengths for row in head_report(net, length, args.seed)]
    write_rows(args.out, COLUMNS, rows)
    for row in rows:
        print("  ".join(f"{name} {row[name]}" for name in COLUMNS))


if __name__ == "__main__":
    sys.exit(main())
