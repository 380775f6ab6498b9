"""The tokenizer: known words are one token, others single characters, and decoding restores the text."""

from pathlib import Path

import pytest
from farspan.needle import model_dir, words
from farspan.needle.tokenizer import UNK, build_tokenizer, save_tokenizer, vocabulary

TOKENIZER = build_tokenizer()
REPOSITORY = Path(__file__).parents[3]


def test_every_known_word_is_one_token():
    known = [*words.ADJECTIVES, *words.NOUNS, *words.VALUES, *words.ORDINALS, *words.TEMPLATE_WORDS]
    known += [word for kind in words.FILLER_KINDS.values() for word in kind]
    assert all(TOKENIZER.encode(word, add_special_tokens=False).tokens == [word] for word in known)


def test_key_words_and_values_never_occur_in_filler():
    filler = {word for kind in words.FILLER_KINDS.values() for word in kind}
    keys = [*words.ADJECTIVES, *words.NOUNS, *words.VALUES, *words.ORDINALS]
    assert len(set(keys)) == len(keys)
    assert not filler & set(keys)


def test_text_comes_back_readable():
    text = "note: amber falcon 4103. question: amber falcon answer: amber falcon"
    decoded = TOKENIZER.decode(TOKENIZER.encode(text).ids)
    assert decoded == text.replace(":", " :")


@pytest.mark.parametrize("path", ["integration/needle/tasks.py", "pyproject.toml", "LICENSE"])
def test_any_text_tokenizes_nearly_without_unknowns(path):
    text = (REPOSITORY / path).read_text()
    tokens = TOKENIZER.encode(text).tokens
    assert len(tokens) > 100
    assert tokens.count(UNK) <= sum(not character.isascii() for character in text)


def test_a_strange_character_stays_alone():
    tokens = TOKENIZER.encode("foo漢bar Café", add_special_tokens=False).tokens
    assert tokens == ["f", "##o", "##o", UNK, "b", "##a", "##r", "c", "##a", "##f", "##e"]
    assert len(TOKENIZER.encode("x" * 5000, add_special_tokens=False).tokens) == 5000


def test_the_bundled_files_are_what_the_code_builds(tmp_path):
    save_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (model_dir() / name).read_text()
    assert TOKENIZER.get_vocab_size() == len(vocabulary())
