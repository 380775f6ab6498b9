"""Synthetic queries and keys whose attention looks like that of trained models, with shares that do not depend on N.

Random queries and keys give near-uniform attention, on which sparse timings mean nothing. Here every query head is a
mix of patterns: attention sinks, the token itself, a local band, a slash (a fixed distance), scattered vertical tokens,
topics (blocks that look for blocks of the same topic) and a diffuse rest. A head's `HeadMix` gives the share of
attention mass of each pattern on a typical late row; logits grow with ln N so that the shares hold at every length.
"""

import math
from dataclasses import dataclass

import torch

# Of 128 head dimensions; other head sizes scale these down in proportion.
SLASH_PAIRS, LOCAL_PAIRS, TOPIC_DIMS, NOISE_DIMS = 36, 14, 16, 8
VERTICAL_TOKENS, NUM_TOPICS, TOPIC_BLOCK = 24, 12, 128
NUM_SINKS = 4
BAND = 256


@dataclass(frozen=True)
class HeadMix:
    """Shares of attention mass of one query head; the rest, up to 1, is spread over all keys."""

    sink: float = 0.0
    recent: float = 0.0
    band: float = 0.0
    slash: float = 0.0
    vertical: float = 0.0
    topic: float = 0.0


# A cycle of head kinds, roughly as often as published head studies (MInference, FlexPrefill) report them.
HEAD_MIXES = (
    HeadMix(sink=0.60, band=0.38),
    HeadMix(sink=0.28, recent=0.25, vertical=0.45),
    HeadMix(sink=0.40, recent=0.30, slash=0.28),
    HeadMix(sink=0.30, band=0.68),
    HeadMix(sink=0.33, recent=0.20, slash=0.15, vertical=0.30),
    HeadMix(sink=0.71, recent=0.15, vertical=0.12),
    HeadMix(topic=0.96),
    HeadMix(sink=0.35, recent=0.25),
)


def calibrated_qkv(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int = 128,
    *,
    seed: int = 0,
    query_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    mixes: tuple[HeadMix, ...] = HEAD_MIXES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one request.

    query_len: draw queries only of the last so many tokens, as in a chunk; None for all tokens.
    Returns q [query_len, num_q_heads, head_dim] and k, v [num_tokens, num_kv_heads, head_dim] in `dtype`, for
    attention with scale `head_dim ** -0.5`. The same seed gives the same structure for every query length and, since
    verticals, slashes and topics are drawn on the CPU, on every device.
    """
    gen = torch.Generator().manual_seed(seed)
    noise_gen = torch.Generator(device).manual_seed(seed)
    factor = head_dim / 128
    slash_pairs, local_pairs = int(SLASH_PAIRS * factor), int(LOCAL_PAIRS * factor)
    topic_dims, noise_dims = int(TOPIC_DIMS * factor), int(NOISE_DIMS * factor)
    group = num_q_heads // num_kv_heads
    first_query = num_tokens - (num_tokens if query_len is None else query_len)
    pos = torch.arange(num_tokens, device=device, dtype=torch.float32)
    query_pos = pos[first_query:]
    query = torch.zeros(len(query_pos), num_q_heads, head_dim, device=device, dtype=dtype)
    key = torch.zeros(num_tokens, num_kv_heads, head_dim, device=device, dtype=dtype)
    value = torch.randn(num_tokens, num_kv_heads, head_dim, generator=noise_gen, device=device).to(dtype)
    widths = [2 * slash_pairs, 2 * local_pairs, 1, 1, topic_dims, noise_dims]
    columns = torch.tensor([0, *widths]).cumsum(0).tolist()
    assert columns[-1] <= head_dim

    def part(tensor: torch.Tensor, head: int, index: int) -> torch.Tensor:
        return tensor[:, head, columns[index] : columns[index + 1]]

    for kv_head in range(num_kv_heads):
        slash_freq = torch.rand(slash_pairs, generator=gen).mul(math.pi).to(device)
        local_freq = torch.randn(local_pairs, generator=gen).mul(4 / BAND).to(device)
        topics = torch.nn.functional.normalize(torch.randn(NUM_TOPICS, topic_dims, generator=gen), dim=-1)
        block_topic = torch.randint(NUM_TOPICS, (-(-num_tokens // TOPIC_BLOCK),), generator=gen)
        topic = topics[block_topic].repeat_interleave(TOPIC_BLOCK, dim=0)[:num_tokens].to(device)
        verticals = (torch.rand(VERTICAL_TOKENS, generator=gen) * num_tokens).long().to(device)
        part(key, kv_head, 0).copy_(_rotated(pos, slash_freq))
        part(key, kv_head, 1).copy_(_rotated(pos, local_freq))
        part(key, kv_head, 4).copy_(topic)
        # Queries find sinks and verticals at any distance and in any topic: these keys have no position and no topic.
        key[:NUM_SINKS, kv_head] = 0.0
        key[verticals, kv_head] = 0.0
        part(key, kv_head, 2)[:NUM_SINKS] = 1.0
        part(key, kv_head, 3)[verticals] = 1.0
        part(key, kv_head, 5).copy_(torch.randn(num_tokens, noise_dims, generator=noise_gen, device=device))
        for head in range(kv_head * group, (kv_head + 1) * group):
            mix = mixes[head % len(mixes)]
            rest = max(1 - mix.sink - mix.recent - mix.band - mix.slash - mix.vertical - mix.topic, 0.02)
            # A mean of F cosines times a has variance a²/2F over far keys, which adds to the mass of the diffuse rest.
            recent_gain = slash_gain = band_gain = 0.0
            for _ in range(20):
                variance = 0.25 + ((slash_gain**2 + recent_gain**2) / slash_pairs + band_gain**2 / local_pairs) / 2
                background = math.log(num_tokens / rest) + variance / 2
                recent_gain, slash_gain = gain(mix.recent, 1, background), gain(mix.slash, 1, background)
                band_gain = gain(mix.band, BAND / 4, background)
            distance = 300 + int(float(torch.rand(1, generator=gen)) * min(num_tokens, 32768) * 0.6)
            recent, slash = _rotated(query_pos, slash_freq), _rotated(query_pos - distance, slash_freq)
            part(query, head, 0).copy_(recent * recent_gain + slash * slash_gain)
            part(query, head, 1).copy_(_rotated(query_pos, local_freq) * band_gain)
            part(query, head, 2).fill_(gain(mix.sink, NUM_SINKS, background))
            part(query, head, 3).fill_(gain(mix.vertical, VERTICAL_TOKENS, background))
            part(query, head, 4).copy_(topic[first_query:] * gain(mix.topic, num_tokens / NUM_TOPICS, background))
            # The logits of a row have a standard deviation of half a nat, as content causes it.
            noise = torch.randn(len(query_pos), noise_dims, generator=noise_gen, device=device)
            part(query, head, 5).copy_(noise * (0.5 / noise_dims**0.5))
    return query * math.sqrt(head_dim), key, value


def gain(share: float, count: float, background: float) -> float:
    """Logit at which `count` keys get `share` of the mass; background: ln(total mass) for logits of 0 elsewhere."""
    return max(background + math.log(share / count), 0.0) if share else 0.0


def _rotated(pos: torch.Tensor, freq: torch.Tensor) -> torch.Tensor:
    """Unit vectors whose products are the mean of cos(freq * distance): [len(pos), 2 * len(freq)]."""
    angle = pos[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1) / math.sqrt(len(freq))
