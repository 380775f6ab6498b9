"""Attention biases that give a model with random weights attention similar to that of trained models.

Random weights give near-uniform attention, on which sparse timings mean nothing. With rotary positions, a constant bias
on queries and keys makes attention depend only on the distance. So biases make every kind of head that looks at
distances: local heads, slashes, and diffuse heads, which have no bias. Sinks and verticals would need content.
"""

import math
from dataclasses import dataclass

import torch

KEY_GAIN = 2.0


@dataclass(frozen=True)
class HeadKind:
    """What one query head looks for."""

    peak: float
    """Logit at the distance looked for, over that of far keys; 0 for a diffuse head."""
    width: int = 1
    """Only pairs of dimensions that rotate by at least one radian within this many tokens take part."""
    is_slash: bool = False
    """Whether the distance looked for is drawn at random instead of 0."""


# A cycle of query heads: half of them local, a quarter with a slash, one wide, one diffuse.
HEAD_KINDS = (
    HeadKind(peak=16.0, width=256),
    HeadKind(peak=16.0, width=4096),
    HeadKind(peak=18.0, width=256, is_slash=True),
    HeadKind(peak=14.0, width=32768),
    HeadKind(peak=17.0, width=1024),
    HeadKind(peak=16.0, width=128),
    HeadKind(peak=18.0, width=1024, is_slash=True),
    HeadKind(peak=0.0),
)


def attention_biases(
    num_q_heads: int, num_kv_heads: int, head_dim: int, rope_theta: float, max_distance: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Biases of one layer for rotary positions in halves (neox style) and logits scaled by `head_dim ** -0.5`.

    max_distance: upper bound of slashes, in tokens.
    Returns two float32 biases: of queries [num_q_heads * head_dim], of keys [num_kv_heads * head_dim].
    """
    generator = torch.Generator().manual_seed(seed)
    num_pairs = head_dim // 2
    frequency = rope_theta ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    query = torch.zeros(num_q_heads, head_dim, dtype=torch.float64)
    for head in range(num_q_heads):
        kind = HEAD_KINDS[head % len(HEAD_KINDS)]
        takes_part = frequency >= 1 / kind.width
        distance = float(torch.rand(1, generator=generator)) * max_distance if kind.is_slash else 0.0
        gain = kind.peak * math.sqrt(head_dim) / (KEY_GAIN * int(takes_part.sum()))
        # At this distance, the query's angle equals the key's.
        angle = -frequency * distance
        query[head, :num_pairs] = torch.where(takes_part, gain * angle.cos(), 0.0)
        query[head, num_pairs:] = torch.where(takes_part, gain * angle.sin(), 0.0)
    key = torch.zeros(num_kv_heads, head_dim)
    key[:, :num_pairs] = KEY_GAIN
    return query.flatten().float(), key.flatten()
