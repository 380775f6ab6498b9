"""Which KV heads look far back: the file that `farspan profile` writes, and which heads are hot by it."""

from functools import cache
from pathlib import Path

import msgspec
from farspan.engine_ext.errors import ConfigError

FORMAT = 1
MAKE_ONE = "Make one with `farspan profile MODEL --text FILES`"


class HeadProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `farspan profile` measured of a model."""

    format: int
    model: str
    num_tokens: int
    """Of the longest text."""
    sink_tokens: int
    recent_tokens: int
    scores: tuple[tuple[float, ...], ...]
    """Per layer and KV head: attention mass outside of the first `sink_tokens` and the last `recent_tokens` tokens, of
    the query head of the group that has most."""


@cache
def load_profile(file: str) -> HeadProfile:
    """Read a profile, once per process. Raises ConfigError."""
    try:
        profile = msgspec.json.decode(Path(file).expanduser().read_bytes(), type=HeadProfile)
    except OSError as error:
        raise ConfigError(f"offload.head_profile={file!r} cannot be read ({error.strerror}). {MAKE_ONE}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"offload.head_profile={file!r} is no profile of heads ({error}). {MAKE_ONE}.") from error
    if profile.format != FORMAT:
        raise ConfigError(
            f"offload.head_profile={file!r} has format {profile.format}; this farspan reads {FORMAT}. {MAKE_ONE}."
        )
    return profile


def check_profile(file: str, num_layers: int, num_kv_heads: int) -> HeadProfile:
    """Read a profile and hold it against a model. Raises ConfigError."""
    profile = load_profile(file)
    heads = sorted({len(layer) for layer in profile.scores})
    if len(profile.scores) != num_layers or heads != [num_kv_heads]:
        found = ", ".join(map(str, heads)) or "no"
        raise ConfigError(
            f"offload.head_profile={file!r} is of {len(profile.scores)} layers with {found} KV heads, of "
            f"{profile.model}; this model has {num_layers} layers with {num_kv_heads}. {MAKE_ONE}."
        )
    return profile


def counts_by_score(profile: HeadProfile, num_hot: int, num_ranks: int) -> tuple[int, ...]:
    """Hot KV heads of every layer, over all ranks, where `num_hot` a layer are hot on average.

    Each rank has as many in a layer as the others: the best of the heads that it holds. Heads are taken in the order of
    that layer's scores, all layers together.
    """
    num_kv_heads = len(profile.scores[0])
    holders = min(num_ranks, num_kv_heads)
    per_rank = num_kv_heads // holders
    steps = []
    for layer, scores in enumerate(profile.scores):
        of_ranks = [sorted(scores[rank * per_rank : (rank + 1) * per_rank], reverse=True) for rank in range(holders)]
        steps += [(sum(best) / holders, layer) for best in zip(*of_ranks, strict=True)]
    counts = [0] * len(profile.scores)
    for _, layer in sorted(steps, key=lambda step: (-step[0], step[1]))[: num_hot * len(counts) // holders]:
        counts[layer] += holders
    return tuple(counts)


def order_by_score(profile: HeadProfile, layer: int, rank: int, num_ranks: int) -> list[int]:
    """The KV heads of a rank in one layer, counted from its first one, in the order of falling scores."""
    scores = profile.scores[layer]
    per_rank = max(len(scores) // num_ranks, 1)
    first = rank * len(scores) // num_ranks
    return sorted(range(per_rank), key=lambda head: -scores[first + head])
