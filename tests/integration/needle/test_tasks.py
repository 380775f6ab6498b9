"""The task generator: exact lengths, depths, seeds, the held-out split, scoring."""

import itertools

import pytest
from farspan.needle.tasks import NUM_MULTI, TASKS, is_held_out, make_sample, score
from farspan.needle.tokenizer import build_tokenizer
from farspan.needle.words import ADJECTIVES, NOUNS, ORDINALS, VALUES

TOKENIZER = build_tokenizer()


class CharacterTokenizer:
    """A stand-in for another model's tokenizer, with several tokens per word."""

    def encode(self, text: str) -> list[int]:
        """One token per character."""
        return [ord(character) for character in text]


@pytest.mark.parametrize("length", [256, 1000, 1024, 4097])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_exactly_the_asked_tokens(task, length):
    sample = make_sample(task, length, seed=5)
    assert len(TOKENIZER.encode(sample.prompt).ids) == length
    completion = TOKENIZER.encode(sample.completion, add_special_tokens=False).ids
    assert sample.max_new_tokens == len(completion) + 1


@pytest.mark.parametrize("task", TASKS)
def test_the_longest_prompt_can_be_made(task):
    sample = make_sample(task, 131072, seed=1, depth=0.5)
    assert len(TOKENIZER.encode(sample.prompt).ids) == 131072


@pytest.mark.parametrize("task", TASKS)
def test_seeds_decide_everything(task):
    assert make_sample(task, 512, 3) == make_sample(task, 512, 3)
    assert make_sample(task, 512, 3).prompt != make_sample(task, 512, 4).prompt


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey_1", "niah_multikey_3", "niah_multivalue"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(task, depth):
    sample = make_sample(task, 4096, seed=9, depth=depth)
    words = sample.prompt.split()
    asked = words[-2:]
    place = next(i for i in range(len(words)) if words[i : i + 2] == asked)
    assert place / len(words) == pytest.approx(depth, abs=0.03)
    assert words[place + 2] == sample.answers[0] + "."


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["test", "train"])
def test_the_split_decides_which_pairs_are_asked_for(task, split):
    for seed in range(20):
        sample = make_sample(task, 512, seed, split=split)
        question = sample.prompt[sample.prompt.index("question") :].replace(":", "")
        text = f"{question[question.index('answer') :]} {sample.completion}".split()
        pairs = [(a, b) for a, b in itertools.pairwise(text) if a in ADJECTIVES and b in NOUNS]
        if task == "niah_multivalue":
            name = text[1]
            pairs = [(name, value) for value in sample.answers]
        if task == "variable_tracking":
            names = [text[2], *sample.answers]
            pairs = list(itertools.pairwise(names))
        assert pairs
        assert all(is_held_out(*pair) == (split == "test") for pair in pairs)


def test_training_batches_never_hold_a_held_out_pair():
    torch = pytest.importorskip("torch")
    from benchmarks.needle_training.batches import BatchMaker

    batches = BatchMaker(0, torch.device("cpu"), 131072, num_filler_tokens=20_000)
    word_of = {token: word for word, token in batches.vocab.items()}
    key_words = {*ADJECTIVES, *NOUNS, *VALUES}
    kinds = {"repeat": 0.25, "keys": 0.25, "values": 0.25, "trace": 0.25}
    num_pairs = 0
    for length in (128, 1024, 4096):
        tokens = batches.make(16, length, kinds, spread=False).tokens
        for row in tokens.tolist():
            words = [word_of[token] for token in row]
            for a, b in itertools.pairwise(words):
                # A value and the key after it belong to different needles.
                if a not in VALUES and a in key_words and b in key_words and (a in ADJECTIVES or b not in ADJECTIVES):
                    num_pairs += 1
                    assert not is_held_out(a, b)
    assert num_pairs > 1000
    for row in batches.make(8, 1024, {"values": 1.0}, spread=False).tokens.tolist():
        words = [word_of[token] for token in row]
        bound = [(words[place - 1], words[place + 1]) for place, word in enumerate(words) if word in ORDINALS]
        assert bound
        assert not any(is_held_out(*pair) for pair in bound)


@pytest.mark.parametrize("task", ["niah_multivalue", "niah_multiquery"])
def test_score_is_the_share_of_answers_found(task):
    sample = make_sample(task, 512, seed=2)
    assert len(sample.answers) == NUM_MULTI
    assert score(sample.completion, sample) == 1.0
    assert score(sample.completion.upper() + "</s>", sample) == 1.0
    assert score(sample.answers[0], sample) == 1 / NUM_MULTI
    assert score("", sample) == 0.0
    assert score(sample.answers[0] + "7", sample) == 0.0


def test_another_tokenizer_gets_prompts_of_its_own_length():
    tokenizer = CharacterTokenizer()
    for task in TASKS:
        for length in (4096, 20_000):
            sample = make_sample(task, length, seed=1, tokenizer=tokenizer)
            assert 0.97 * length <= len(tokenizer.encode(sample.prompt)) <= length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "niah"}, "known tasks"),
        ({"length": 100}, "shortest"),
        ({"depth": 1.5}, "depth"),
        ({"split": "dev"}, "split"),
    ],
    ids=["task", "length", "depth", "split"],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sample(**{"task": "niah_single", "length": 1024, "seed": 0, **arguments})
