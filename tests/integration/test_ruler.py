"""Questions in RULER's form: what is hidden and asked, lengths, chat templates, haystacks of the user's."""

import pytest
from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.evaluate import EvalSettings, check_settings, engine_prompt, make_samples, run_eval
from farspan.evaluation.prose import TEMPLATES, read_sentences
from farspan.evaluation.results import Cell
from farspan.evaluation.ruler import make_ruler_sample, ruler_score
from farspan.needle.tasks import TASKS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.integration.test_evaluate import StubModels

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Letters(PreTrainedTokenizerFast):
    """Every character is a token."""

    def __init__(self) -> None:
        vocabulary = {chr(code): code for code in range(128)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        super().__init__(tokenizer_object=tokenizer, unk_token="?")

    def decode(self, token_ids, **_):
        return "".join(map(chr, token_ids))


@pytest.fixture(scope="module")
def tokenizer() -> Letters:
    return Letters()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1500, 9000])
def test_prompts_hide_what_they_ask(tokenizer, task, length) -> None:
    samples = [make_ruler_sample(task, length, seed, tokenizer) for seed in (0, 1, 1)]
    assert samples[1] == samples[2]
    assert samples[0].prompt != samples[1].prompt
    for sample in samples:
        text, _, question = sample.prompt.rpartition("\n\n")
        assert length - 200 < len(sample.token_ids) == len(sample.prompt) <= length
        for answer in sample.answers:
            assert answer in text
            assert question.count(answer) == 0
        assert ruler_score(sample.completion.upper(), sample) == 1
        assert ruler_score(" nothing", sample) == 0
        if task == "variable_tracking":
            assert len(sample.answers) == 5
            places = [text.index(f"VAR {name} = ") for name in sample.answers]
            assert places == sorted(places)
        else:
            assert text.count("One of the special magic") >= len(sample.answers)


def test_the_needle_lies_at_its_depth(tokenizer) -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = make_ruler_sample("niah_single", 20000, 3, tokenizer, depth=depth)
        assert sample.prompt.index("One of the special") / 20000 == pytest.approx(depth, abs=0.03)


def test_haystacks_follow_the_task(tokenizer) -> None:
    prompts = {task: make_ruler_sample(task, 6000, 0, tokenizer).prompt for task in TASKS}
    assert prompts["niah_single"].count("is: ") == 1
    assert prompts["niah_multikey_1"].count("is: ") == 4
    assert prompts["niah_multikey_2"].count("is: ") > 50
    assert prompts["niah_multikey_3"].count("magic uuids") > 30
    assert prompts["niah_multiquery"].count("is: ") == 4
    assert len(TEMPLATES) == len(set(TEMPLATES)) > 30


def test_chat_templates_are_used_where_there_is_one() -> None:
    tokenizer = Letters()
    plain = make_ruler_sample("niah_single", 2000, 0, tokenizer)
    tokenizer.chat_template = TEMPLATE
    chat = make_ruler_sample("niah_single", 2000, 0, tokenizer)
    assert chat.prompt.startswith("<user>The text below")
    assert "<assistant>The special magic number for" in chat.prompt
    assert len(chat.token_ids) <= 2000
    assert make_ruler_sample("niah_single", 2000, 0, tokenizer, chat=False) == plain
    assert not plain.prompt.startswith("<user>")
    assert engine_prompt(chat) == {"prompt_token_ids": list(chat.token_ids)}
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(ConfigError, match="--no-chat-template"):
        make_ruler_sample("niah_single", 2000, 0, tokenizer)


def test_a_question_without_room_is_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"length=256; a question of niah_multiquery takes \d+ tokens"):
        make_ruler_sample("niah_multiquery", 256, 0, tokenizer)


def test_the_users_text_is_the_haystack(tmp_path, tokenizer) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A title\n\nThe first line\nhas two rows. The second one follows! Is there a third one? 1.2\n")
    sentences = read_sentences([text])
    assert sentences == ["The first line has two rows.", "The second one follows!", "Is there a third one?"]
    prompt = make_ruler_sample("niah_single", 1500, 0, tokenizer, sentences=sentences).prompt
    assert prompt.count("The second one follows!") > 5
    (tmp_path / "empty.txt").write_text("1 2 3")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("empty.txt", "binary.txt", "missing.txt"):
        with pytest.raises(ConfigError, match=f"{name}.*name"):
            read_sentences([tmp_path / name])


def test_other_models_are_asked_in_rulers_form(tmp_path, model_dirs, monkeypatch) -> None:
    wanted = EvalSettings(str(model_dirs("llama")), ("niah_single",), (1024,), tmp_path / "out", count=2)
    tokenizer = Letters()
    monkeypatch.setattr("farspan.evaluation.evaluate.load_tokenizer", lambda model: tokenizer)
    samples = make_samples(wanted, Cell("dense", "niah_single", 1024, None, 0, 2))
    assert all("special magic number" in sample.prompt for sample in samples)
    assert [sample.max_new_tokens for sample in samples] == [7 + 32] * 2
    assert [cell.accuracy for cell in run_eval(wanted, StubModels())] == [1.0]
    with pytest.raises(ConfigError, match="questions="):
        run_eval(EvalSettings(**{**vars(wanted), "chat_template": False}), StubModels())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": "ruler"}, "knows its own words alone"),
        ({"questions": "poems"}, "known are auto, ruler, words"),
        ({"haystack": ("text.txt",)}, "filler of its own"),
    ],
)
def test_forms_that_cannot_be_are_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(EvalSettings("needle", ("niah_single",), (1024,), tmp_path, **changes))
