"""Long-context questions for models that read prose, in the form of RULER (arXiv 2404.06654), from a seed.

Needles are sentences such as `One of the special magic numbers for amber-falcon is: 4821907.` in a haystack of prose,
or of other needles; variable tracking hides `VAR KQZXW = 51823` and `VAR BDLRM = VAR KQZXW`. A question follows the
text, and the answer is begun for the model, so that a model without instructions can go on. An instruction-tuned model
gets text and question through the chat template of its tokenizer.
"""

import random
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.prose import own_sentences, text_sentences
from farspan.needle.tasks import NUM_MULTI, TASKS, Sample
from farspan.needle.words import ADJECTIVES, NOUNS

NUM_KEYS = 4
"""Keys in a haystack of prose where several are hidden and one is asked for."""
NUM_HOPS = 4
"""Assignments after the first one of a variable chain."""
NAME_LEN = 5
MAX_TRIES = 12
WORDS, LETTERS = "numbers", "uuids"


@dataclass(frozen=True)
class RulerSample(Sample):
    """A question as token ids; `prompt` is their text."""

    token_ids: tuple[int, ...] = ()
    question: str = ""
    """What is asked after the text, as it stands in the prompt."""


@dataclass(frozen=True)
class Question:
    """What is hidden, and what is asked."""

    needles: tuple[str, ...]
    """The sentences that the answer needs; the first one lies at the depth asked for."""
    in_order: bool
    """Whether they follow each other in the text."""
    others: tuple[str, ...]
    """Further needles that are not asked for."""
    haystack_of_needles: str | None
    """What the haystack's own needles hide, "numbers" or "uuids"; None for prose."""
    before: str
    after: str
    """The question."""
    answer_start: str
    """Begins the answer for the model."""
    answers: tuple[str, ...]


def make_ruler_sample(
    task: str,
    length: int,
    seed: int,
    tokenizer: Any,
    *,
    depth: float | None = None,
    chat: bool = True,
    sentences: Sequence[str] = (),
) -> RulerSample:
    """A prompt of at most `length` tokens, and hardly fewer; the same arguments always give the same one.

    tokenizer: of transformers. depth: place of the first needle, 0 to 1; drawn from the seed if None. chat: use the
    tokenizer's chat template where it has one. sentences: the haystack's; our own prose if empty.
    Raises ConfigError where no prompt is as short as `length`.
    """
    assert task in TASKS, task
    rng = random.Random(f"ruler/{task}/{seed}")
    place = rng.random() if depth is None else depth
    question = make_question(f"{task}_{1 + seed % 3}" if task == "niah_multikey" else task, rng)
    if question.haystack_of_needles is not None:
        stream: Iterator[str] = other_needles(question.haystack_of_needles, rng)
    elif sentences:
        stream = text_sentences(sentences, rng)
    else:
        stream = own_sentences(rng)
    places = [place, *(rng.random() for _ in question.needles[1:])]
    if question.in_order:
        places = [place, *sorted(place + (1 - place) * rng.random() for _ in question.needles[1:])]
    hidden = [*zip(places, question.needles, strict=True), *((rng.random(), other) for other in question.others)]
    hay: list[str] = []
    use_template = chat and bool(getattr(tokenizer, "chat_template", None))

    def tokens(num_sentences: int) -> list[int]:
        while len(hay) < num_sentences:
            hay.append(next(stream))
        pieces = hay[:num_sentences]
        for at, needle in sorted(hidden, key=lambda pair: -pair[0]):
            pieces.insert(round(at * num_sentences), needle)
        content = f"{question.before}\n\n{' '.join(pieces)}\n\n{question.after}"
        return encode(tokenizer, content, question.answer_start, use_template)

    fewest = len(tokens(0))
    if fewest > length:
        raise ConfigError(
            f"length={length}; a question of {task} takes {fewest} tokens of this tokenizer without any text around "
            "it. Ask for greater lengths."
        )
    ids = fit(tokens, fewest, length)
    completion = ", ".join(question.answers)
    return RulerSample(
        prompt=tokenizer.decode(ids),
        answers=list(question.answers),
        completion=completion,
        max_new_tokens=len(tokenizer.encode(completion)),
        task=task,
        length=length,
        depth=place,
        seed=seed,
        token_ids=tuple(ids),
        question=question.after,
    )


def fit(tokens: Callable[[int], list[int]], fewest: int, length: int) -> list[int]:
    """The longest prompt of at most `length` tokens that a few tries find.

    tokens: the prompt with n sentences of hay; fewest: its length without any.
    """
    best, low, have = None, 0, fewest
    high, too_many = 16, len(tokens(16))
    for _ in range(MAX_TRIES):
        if too_many <= length:  # not too many at all
            guess = max(int(high * (length - fewest) / (too_many - fewest)), high + 1)
        elif high - low == 1:
            break
        else:
            guess = low + min(max(int((high - low) * (length - have) / (too_many - have)), 1), high - low - 1)
        ids = tokens(guess)
        if len(ids) > length:
            high, too_many = guess, len(ids)
            continue
        best, low, have = ids, guess, len(ids)
        if too_many <= length:
            high, too_many = guess, len(ids)
        if length - have < (have - fewest) / guess:  # less than a sentence
            break
    return tokens(0) if best is None else best


def encode(tokenizer: Any, content: str, answer_start: str, use_template: bool) -> list[int]:
    """Token ids of a question whose answer has begun."""
    if not use_template:
        return list(tokenizer.encode(f"{content} {answer_start}"))
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever the template's own code raises
        raise ConfigError(
            f"the tokenizer's chat template cannot write a question ({error}); turn it off with --no-chat-template"
        ) from error
    # The template has written the special tokens.
    return list(tokenizer.encode(text + answer_start, add_special_tokens=False))


def ruler_score(prediction: str, sample: Sample) -> float:
    """Fraction of the expected answers that occur in the prediction, as RULER scores."""
    found = prediction.lower()
    return sum(answer.lower() in found for answer in sample.answers) / len(sample.answers)


def make_question(task: str, rng: random.Random) -> Question:
    """What a task hides and asks."""
    if task == "variable_tracking":
        return tracking_question(rng)
    kind = LETTERS if task == "niah_multikey_3" else WORDS
    num_asked = NUM_MULTI if task == "niah_multiquery" else 1
    num_values = NUM_MULTI if task == "niah_multivalue" else 1
    num_hidden = NUM_KEYS if task in ("niah_multikey_1", "niah_multiquery") else 1
    keys: list[str] = []
    while len(keys) < max(num_hidden, num_asked):
        key = new_key(kind, rng)
        if key not in keys:
            keys.append(key)
    pairs = [(key, new_value(kind, rng)) for key in keys[:num_asked] for _ in range(num_values)]
    asked = listed(keys[:num_asked])
    one = len(pairs) == 1
    name = f"special magic {kind[:-1] if one else kind}"
    return Question(
        needles=tuple(needle(kind, key, value) for key, value in pairs),
        in_order=False,
        others=tuple(needle(kind, key, new_value(kind, rng)) for key in keys[num_asked:]),
        haystack_of_needles=kind if task in ("niah_multikey_2", "niah_multikey_3") else None,
        before=f"The text below mentions some special magic {kind}. Keep them in mind: a question about them comes "
        "after the text.",
        after=f"{'What is' if one else 'What are all'} the {name} for {asked} that the text above mentions?",
        answer_start=f"The {name} for {asked} that the text mentions {'is' if one else 'are'}",
        answers=tuple(value for _, value in pairs),
    )


def tracking_question(rng: random.Random) -> Question:
    """A chain of variables that take each other's value."""
    names: list[str] = []
    while len(names) < NUM_HOPS + 1:
        name = "".join(rng.choice(string.ascii_uppercase) for _ in range(NAME_LEN))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10 ** (NAME_LEN - 1), 10**NAME_LEN))
    first = f"VAR {names[0]} = {value}."
    return Question(
        needles=(first, *(f"VAR {name} = VAR {source}." for source, name in pairwise(names))),
        in_order=True,
        others=(),
        haystack_of_needles=None,
        before="Between the sentences of the text below, variables are given values. Follow them: a question about one "
        "value comes after the text.",
        after=f"Which variables have the value {value}, directly or through another variable?",
        answer_start=f"The text gives the value {value} to {len(names)} variables, namely",
        answers=tuple(names),
    )


def other_needles(kind: str, rng: random.Random) -> Iterator[str]:
    """Needles of which nobody asks, without end."""
    while True:
        yield needle(kind, new_key(kind, rng), new_value(kind, rng))


def needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def new_key(kind: str, rng: random.Random) -> str:
    return new_uuid(rng) if kind == LETTERS else f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def new_value(kind: str, rng: random.Random) -> str:
    return new_uuid(rng) if kind == LETTERS else str(rng.randrange(10**6, 10**7))


def new_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
