"""Star Attention's two phases in plain PyTorch with any anchor, as the paper's table 3 varies it.

A block is read behind its anchor: tokens of some content at some positions. The anchor's keys are then dropped, unless
the anchor is the first block itself. The query sees all blocks. Source: Star Attention, arXiv 2411.17116.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.plain_llama import KVCache, PlainLlama, attend_behind, attend_last

ROWS_AT_ONCE = 512
"""Of logits over the whole vocabulary."""


@dataclass(frozen=True)
class Anchor:
    """What stands in front of every block but the first."""

    content: Literal["first", "previous", "constant", "random", "shuffled", "none"] = "first"
    """Tokens: of the first or the previous block, the context's commonest one, drawn from the vocabulary, or the first
    block's in another order."""
    positions: Literal["first", "previous", "random"] = "first"
    """Where they stand: as in the first or the previous block, or drawn from all that are before the block."""
    size: float = 1.0
    """As a fraction of a block; only its start is used."""


@dataclass(frozen=True)
class Blocks:
    """How a context is cut: into `share` blocks (1 is dense attention), and the anchor."""

    share: int
    anchor: Anchor = Anchor()
    name: str = ""

    @property
    def variant(self) -> str:
        if self.share == 1:
            return "dense"
        return f"star-n{self.share}" + (f"-{self.name}" if self.name else "")


def read_context(model: PlainLlama, context: torch.Tensor, blocks: Blocks, seed: int = 0) -> KVCache:
    """Phase 1: keys and values of all tokens of a context [num_tokens] int64. seed: of what is drawn."""
    block_len = -(-len(context) // blocks.share)
    anchor_len = int(block_len * blocks.anchor.size)
    generator = torch.Generator().manual_seed(seed)
    first = KVCache()
    read(model, context[:block_len], torch.arange(min(block_len, len(context))), [], first)
    parts = [first]
    fixed = anchor_of(model, context, block_len, anchor_len, blocks.anchor, first, generator)
    for start in range(block_len, len(context), block_len):
        tokens = context[start : start + block_len]
        anchor = fixed
        if anchor is None:
            content, positions = moving_anchor(context, start, block_len, anchor_len, blocks.anchor, generator)
            anchor = KVCache()
            read(model, content, positions, [], anchor)
        own = KVCache()
        read(model, tokens, torch.arange(start, start + len(tokens)), [anchor], own)
        parts.append(own)
    joined = KVCache()
    for layer in range(model.num_layers):
        key, value = zip(*(part.layers[layer] for part in parts), strict=True)
        joined.layers[layer] = torch.cat(key), torch.cat(value)
    return joined


def anchor_of(
    model: PlainLlama,
    context: torch.Tensor,
    block_len: int,
    anchor_len: int,
    anchor: Anchor,
    first: KVCache,
    generator: torch.Generator,
) -> KVCache | None:
    """The anchor that all blocks share; None where each has one of its own. first: block 0's keys and values."""
    if anchor.content == "none" or anchor_len == 0:
        return KVCache()
    if anchor.positions != "first" or anchor.content == "previous":
        return None
    if anchor.content == "first":
        # What stands at the start of the context has the same keys with and without the tokens behind it.
        return first.rows(0, anchor_len)
    content = context[:block_len]
    if anchor.content == "constant":
        content = content.new_full((block_len,), int(context.mode().values))
    elif anchor.content == "random":
        content = torch.randint(model.config["vocab_size"], (block_len,), generator=generator)
    else:
        content = content[torch.randperm(block_len, generator=generator)]
    cache = KVCache()
    read(model, content[:anchor_len], torch.arange(anchor_len), [], cache)
    return cache


def moving_anchor(
    context: torch.Tensor, start: int, block_len: int, anchor_len: int, anchor: Anchor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions in front of the block that begins at `start`."""
    previous = torch.arange(start - block_len, start)[:anchor_len]
    content = context[previous] if anchor.content == "previous" else context[:anchor_len]
    if anchor.positions == "previous":
        return content, previous
    if anchor.positions == "random":
        return content, torch.randperm(start, generator=generator)[:anchor_len].sort().values
    return content, torch.arange(anchor_len)


def read(
    model: PlainLlama, tokens: torch.Tensor, positions: torch.Tensor, seen: Sequence[KVCache], own: KVCache
) -> torch.Tensor:
    """Hidden states of tokens that see `seen`, `own` and each other causally; their keys are appended to `own`."""
    return model.forward(tokens, positions, attend_behind(model, seen, own))


def log_probs(model: PlainLlama, context: KVCache, context_len: int, query: torch.Tensor) -> torch.Tensor:
    """Natural-log probability [num_tokens - 1] of each token of a query but the first, given all before it."""
    positions = torch.arange(context_len, context_len + len(query))
    hidden = read(model, query, positions, [context], KVCache())
    parts = []
    for start in range(0, len(query) - 1, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, len(query) - 1)
        logits = model.logits(hidden[start:end]).float().log_softmax(-1)
        parts.append(logits.gather(1, query[start + 1 : end + 1, None].to(logits.device))[:, 0].cpu())
    return torch.cat(parts)


def generate(
    model: PlainLlama, context: KVCache, context_len: int, query: torch.Tensor, max_tokens: int, stop: int | None = None
) -> list[int]:
    """Greedy tokens behind a query, until the token `stop`, which is left out."""
    own = KVCache()
    hidden = read(model, query, torch.arange(context_len, context_len + len(query)), [context], own)
    whole = context.extended(own, max_tokens)
    num_keys, at = sum(len(cache.layers[0][0]) for cache in (context, own)), context_len + len(query)
    answer: list[int] = []
    while len(answer) < max_tokens:
        token = int(model.logits(hidden[-1:])[0].argmax())
        if token == stop:
            break
        answer.append(token)
        hidden = model.forward(torch.tensor([token]), torch.tensor([at]), attend_last(model, whole, num_keys))
        num_keys, at = num_keys + 1, at + 1
    return answer
