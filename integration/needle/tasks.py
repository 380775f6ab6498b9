"""Long-context tasks in the manner of RULER (arXiv 2404.06654), generated from a seed as plain text.

Needles are sentences among filler sentences; a prompt ends where the first answer has to follow:

    note: amber falcon 4821.      … question: amber falcon answer: amber falcon            -> 4821
    note: falcon first 4821.      … question: all falcon answer: falcon first              -> 4821 falcon second …
    set falcon harbor.            … question: trace falcon answer: set falcon              -> harbor set harbor …

Held-out split: adjectives, nouns and values are divided into `NUM_GROUPS` groups each. In training, the words of a key,
a noun and its value, and the words of a link are always from different groups; a test prompt asks for words of one
group. So no tested key, noun-value pair or link was seen in training, in any role.
"""

import random
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from .words import ADJECTIVES, FILLER_KINDS, NOUNS, ORDINALS, SENTENCES, VALUES, successors

NUM_GROUPS = 8
NUM_MULTI = 4  # needles asked for by multi-value and multi-query, as in RULER
NUM_HOPS = 3  # links of a variable chain, the last one being the value
NUM_CHAINS = 3  # variable chains in a prompt; one is asked for
MIN_LENGTH = 256

TASKS = (
    "niah_single",
    "niah_multikey",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
)


@dataclass(frozen=True)
class Sample:
    """One prompt, and the answers that must occur in the generated text.

    `completion` is the text of a perfect model: the answers and the words between them.
    """

    prompt: str
    answers: list[str]
    completion: str
    max_new_tokens: int
    task: str
    length: int
    depth: float
    seed: int


@dataclass(frozen=True)
class _Layout:
    """Needles (the question asks for `targets`, not for `distractors`) and the question, as lists of words."""

    targets: list[list[str]]
    distractors: list[list[str]]
    question: list[str]
    completion: list[str]
    answers: list[str]


def make_sample(
    task: str, length: int, seed: int, depth: float | None = None, split: str = "test", tokenizer=None
) -> Sample:
    """A prompt of `length` tokens, BOS included; the same arguments always give the same sample.

    depth: place of the first target: 0 is the start, 1 just before the question; drawn from the seed if None.
    split: "test" asks only for held-out pairs, "train" only for other pairs.
    tokenizer: anything with `encode(text)`; None means the bundled one, in which every word is one token. With another
        tokenizer the prompt has at most `length` tokens, and nearly as many.
    Raises ValueError for unknown tasks and splits, depths outside of [0, 1], and lengths for which there is no prompt.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}; known tasks: {', '.join(TASKS)}")
    if length < MIN_LENGTH:
        raise ValueError(f"length={length}; the shortest prompt has {MIN_LENGTH} tokens")
    if split not in ("test", "train"):
        raise ValueError(f"split={split!r}; must be 'test' or 'train'")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth}; must be in [0, 1]")
    if tokenizer is None:
        return _build(task, length, length, seed, depth, split)
    num_words = length
    for _ in range(6):
        sample = _build(task, num_words, length, seed, depth, split)
        num_tokens = _count_tokens(tokenizer, sample.prompt)
        if 0 <= length - num_tokens <= length // 100:
            break
        # Aim a little low: a prompt may be slightly too small, but not too large.
        num_words = max(MIN_LENGTH // 2, int(num_words * length / num_tokens * 0.997))
    if num_tokens > length:
        raise ValueError(f"no {task} prompt of {length} tokens found for this tokenizer; ask for a greater length")
    return sample


def score(prediction: str, sample: Sample) -> float:
    """Fraction of the expected answers that occur as words in `prediction`, as RULER scores."""
    found = set(_tokenize_words(prediction))
    return sum(answer in found for answer in sample.answers) / len(sample.answers)


def filler_words(rng: random.Random, num_words: int) -> list[list[str]]:
    """Sentences with `num_words` words in total, full stops included; the last sentence may be cut off."""
    table = _successor_table()
    sentences = []
    while num_words > 0:
        kinds = SENTENCES[int(rng.random() * len(SENTENCES))]
        word = "."
        sentence = []
        for kind in kinds:
            choices = table[word, kind]
            word = choices[int(rng.random() * len(choices))]
            sentence.append(word)
        if len(sentence) > num_words:
            sentence = [*sentence[: num_words - 1], "."]
        num_words -= len(sentence)
        sentences.append(sentence)
    return sentences


def is_held_out(first: str, second: str) -> bool:
    """Whether these two words (adjective or noun, then noun or value) are never bound to each other in training."""
    return group_of(first) == group_of(second)


@cache
def group_of(word: str) -> int:
    """Group of a key word or value, in [0, NUM_GROUPS)."""
    for words in (ADJECTIVES, NOUNS, VALUES):
        if word in words:
            return words.index(word) % NUM_GROUPS
    raise ValueError(f"{word!r} is neither a key word nor a value")


def needle(first: str, second: str, value: str) -> list[str]:
    """The words of a note."""
    return ["note", ":", first, second, value, "."]


def link(name: str, target: str) -> list[str]:
    """The words of a variable assignment."""
    return ["set", name, target, "."]


def _build(task: str, num_words: int, length: int, seed: int, depth: float | None, split: str) -> Sample:
    rng = random.Random(f"{task}/{seed}/{split}")
    if depth is None:
        depth = rng.random()
    if task == "niah_multikey":
        task_variant = f"niah_multikey_{1 + seed % 3}"
    else:
        task_variant = task
    layout = _layout(task_variant, num_words, rng, split == "test")
    needles = [*layout.targets, *layout.distractors]
    num_filler = num_words - 1 - sum(map(len, needles)) - len(layout.question)
    pieces = filler_words(rng, num_filler) + layout.distractors
    rng.shuffle(pieces)
    # The first target is at `depth`, the others anywhere; the links of a chain keep their order.
    places = [depth, *(rng.random() for _ in layout.targets[1:])]
    if task_variant == "variable_tracking":
        places = [depth, *sorted(depth + (1 - depth) * rng.random() for _ in layout.targets[1:])]
    for place, target in sorted(zip(places, layout.targets, strict=True), key=lambda pair: -pair[0]):
        pieces.insert(round(place * len(pieces)), target)
    words = [word for piece in pieces for word in piece] + layout.question
    return Sample(
        prompt=_to_text(words),
        answers=layout.answers,
        completion=_to_text(layout.completion),
        max_new_tokens=len(layout.completion) + 1,
        task=task,
        length=length,
        depth=depth,
        seed=seed,
    )


def _layout(task: str, num_words: int, rng: random.Random, held_out: bool) -> _Layout:
    if task == "niah_multivalue":
        return _multivalue_layout(num_words, rng, held_out)
    if task == "variable_tracking":
        return _tracking_layout(rng, held_out)
    num_asked = NUM_MULTI if task == "niah_multiquery" else 1
    asked = _draw_keys(rng, num_asked, held_out, taken=set())
    values = rng.sample(VALUES, num_asked)
    question = ["question", ":", *(word for key in asked for word in key), "answer", ":", *asked[0]]
    completion = [values[0]]
    for key, value in zip(asked[1:], values[1:], strict=True):
        completion += [*key, value]
    num_free = num_words - 1 - len(question) - 6 * num_asked
    num_distractors = {
        "niah_single": 0,
        "niah_multikey_1": 3,
        "niah_multikey_2": num_free // 24,  # a quarter of the haystack
        "niah_multikey_3": num_free // 6,  # all of it
        "niah_multiquery": NUM_MULTI,
    }[task]
    distractor_keys = _draw_keys(rng, num_distractors, None, taken=set(asked))
    return _Layout(
        targets=[needle(*key, value) for key, value in zip(asked, values, strict=True)],
        distractors=[needle(*key, rng.choice(VALUES)) for key in distractor_keys],
        question=question,
        completion=completion,
        answers=values,
    )


def _multivalue_layout(num_words: int, rng: random.Random, held_out: bool) -> _Layout:
    asked, *others = rng.sample(NOUNS, 4)
    ordinals = ORDINALS[:NUM_MULTI]
    values = rng.sample([value for value in VALUES if is_held_out(asked, value) == held_out], NUM_MULTI)
    completion = [values[0]]
    for ordinal, value in zip(ordinals[1:], values[1:], strict=True):
        completion += [asked, ordinal, value]
    return _Layout(
        targets=[needle(asked, ordinal, value) for ordinal, value in zip(ordinals, values, strict=True)],
        distractors=[needle(other, ordinal, rng.choice(VALUES)) for other in others for ordinal in ordinals],
        question=["question", ":", "all", asked, "answer", ":", asked, ordinals[0]],
        completion=completion,
        answers=values,
    )


def _tracking_layout(rng: random.Random, held_out: bool) -> _Layout:
    chains: list[list[str]] = []
    taken: set[str] = set()
    for chain_index in range(NUM_CHAINS):
        asked = chain_index == 0
        chain = [rng.choice([noun for noun in NOUNS if noun not in taken])]
        taken.add(chain[0])
        for hop in range(NUM_HOPS):
            words = VALUES if hop == NUM_HOPS - 1 else NOUNS
            free = [w for w in words if w not in taken and (not asked or is_held_out(chain[-1], w) == held_out)]
            chain.append(rng.choice(free))
            taken.add(chain[-1])
        chains.append(chain)
    asked_chain = chains[0]
    completion = [asked_chain[1]]
    for name, target in pairwise(asked_chain[1:]):
        completion += ["set", name, target]
    return _Layout(
        targets=[link(*pair) for pair in pairwise(asked_chain)],
        distractors=[link(*pair) for chain in chains[1:] for pair in pairwise(chain)],
        question=["question", ":", "trace", asked_chain[0], "answer", ":", "set", asked_chain[0]],
        completion=completion,
        answers=asked_chain[1:],
    )


def _draw_keys(rng: random.Random, count: int, held_out: bool | None, taken: set) -> list[tuple[str, str]]:
    """`count` distinct two-word keys outside `taken`; held_out None takes both kinds of pairs."""
    keys: list[tuple[str, str]] = []
    seen = set(taken)
    while len(keys) < count:
        key = (ADJECTIVES[int(rng.random() * len(ADJECTIVES))], NOUNS[int(rng.random() * len(NOUNS))])
        if key in seen or (held_out is not None and is_held_out(*key) != held_out):
            continue
        seen.add(key)
        keys.append(key)
    return keys


@cache
def _successor_table() -> dict[tuple[str, str], list[str]]:
    words = [word for words in FILLER_KINDS.values() for word in words]
    return {(word, kind): successors(word, kind) for word in words for kind in FILLER_KINDS}


def _to_text(words: list[str]) -> str:
    return " ".join(words).replace(" .", ".").replace(" :", ":")


def _tokenize_words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()


def _count_tokens(tokenizer, text: str) -> int:
    encoded = tokenizer.encode(text)
    return len(getattr(encoded, "ids", encoded))
