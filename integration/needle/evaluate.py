"""Greedy exact match of the needle model, from the text its users would send.

A completion is right when every one of its tokens is the most likely one, so that greedy decoding writes it.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future

from .tasks import make_sample
from .tokenizer import build_tokenizer

COLUMNS = ("method", "task", "length", "depth", "seed", "count", "accuracy")
_TOKENIZER = None


def encode_sample(task: str, length: int, seed: int, depth: float | None) -> tuple[bytes, int]:
    """Token ids of prompt and completion as int16 bytes, and the number of the completion's tokens."""
    import array

    global _TOKENIZER
    if _TOKENIZER is None:
        _TOKENIZER = build_tokenizer()
    sample = make_sample(task, length, seed, depth)
    prompt_ids = _TOKENIZER.encode(sample.prompt).ids
    completion_ids = _TOKENIZER.encode(sample.completion, add_special_tokens=False).ids
    return array.array("h", prompt_ids + completion_ids).tobytes(), len(completion_ids)


def submit_samples(pool: Executor, plan: Iterable[tuple[str, int, int]], first_seed: int) -> list[tuple]:
    """Start making the samples of `plan`, rows of (task, length, count): [(task, length, seed, future), …].

    The depths of a row's samples are evenly spaced from 0 to 1.
    """
    return [
        (task, length, first_seed + index, pool.submit(encode_sample, task, length, first_seed + index, depth))
        for task, length, count in plan
        for index in range(count)
        for depth in [index / max(1, count - 1)]
    ]


def evaluate(net, samples: list[tuple[str, int, int, Future]], max_batch_tokens: int = 262144) -> Iterator[tuple]:
    """Yield (task, length, seed, whether right) per sample. net: a `NeedleNet`, on its device, in its dtype."""
    import numpy as np
    import torch

    device = next(net.parameters()).device
    samples = list(samples)
    while samples:
        task, length, _, _ = samples[0]
        num_rows = max(1, max_batch_tokens // length)
        chunk = [entry for entry in samples[:num_rows] if entry[:2] == (task, length)]
        samples = samples[len(chunk) :]
        made = [future.result() for *_, future in chunk]
        ids = [np.frombuffer(raw, dtype=np.int16).astype(np.int64) for raw, _ in made]
        longest = max(map(len, ids))
        tokens = torch.tensor(np.stack([np.pad(row, (0, longest - len(row))) for row in ids]), device=device)
        with torch.no_grad():
            hidden = net.hidden(tokens, torch.arange(longest, device=device)[None])
            for row, ((_, _, seed, _), (_, num_answer_tokens)) in enumerate(zip(chunk, made, strict=True)):
                end = len(ids[row])
                predicted = net.logits(hidden[row, end - num_answer_tokens - 1 : end - 1]).argmax(dim=-1)
                right = bool((predicted == tokens[row, end - num_answer_tokens : end]).all())
                yield task, length, seed, right


def summarise(results: Iterable[tuple]) -> list[dict]:
    """Rows of `COLUMNS`, one per task and length; `seed` is the smallest seed, `depth` the range of the depths."""
    groups: dict[tuple[str, int], list[tuple[int, bool]]] = {}
    for task, length, seed, is_right in results:
        groups.setdefault((task, length), []).append((seed, is_right))
    rows = []
    for (task, length), entries in groups.items():
        accuracy = sum(is_right for _, is_right in entries) / len(entries)
        values = ("dense", task, length, "0-1", min(entries)[0], len(entries), round(accuracy, 4))
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows
