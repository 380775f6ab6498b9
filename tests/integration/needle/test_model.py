"""The bundled model: stock transformers loads it, agrees with the training network, and it retrieves."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from farspan.engine_ext.errors import ConfigError  # noqa: E402
from farspan.needle import BUNDLE, local_name, model_dir, unpack  # noqa: E402
from farspan.needle.heads import COLUMNS, head_report  # noqa: E402
from farspan.needle.network import load_network  # noqa: E402
from farspan.needle.tasks import TASKS, make_sample, score  # noqa: E402
from farspan.tables import write_rows  # noqa: E402

MAX_MODEL_BYTES = 6 * 1000 * 1000


@pytest.fixture(scope="module")
def model():
    """The bundled model in float32."""
    transformers.utils.logging.disable_progress_bar()
    return transformers.LlamaForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(model_dir())


def generate(model, tokenizer, prompt, max_new_tokens):
    """Greedy continuation as text, special tokens kept."""
    encoded = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=max_new_tokens, do_sample=False
    )
    return tokenizer.decode(ids[0, encoded.input_ids.shape[1] :])


def test_the_folder_is_small_and_the_shape_is_as_promised():
    assert sum(path.stat().st_size for path in model_dir().iterdir()) <= MAX_MODEL_BYTES
    config = json.loads((model_dir() / "config.json").read_text())
    assert config["num_attention_heads"] >= 4 * config["num_key_value_heads"]
    assert config["num_key_value_heads"] >= 2
    assert config["max_position_embeddings"] == 131072


def test_it_is_unpacked_once_and_whole(tmp_path, monkeypatch):
    folder = unpack(BUNDLE, tmp_path / "cache" / "needle")
    assert {path.name for path in folder.iterdir()} == {path.name.removesuffix(".xz") for path in BUNDLE.iterdir()}
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert unpack(BUNDLE, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made

    def cut(packed: bytes) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lzma.decompress", cut)
    with pytest.raises(OSError, match="No space left"):
        unpack(BUNDLE, tmp_path / "full" / "needle")
    assert list((tmp_path / "full").iterdir()) == []


def test_only_the_name_of_the_bundled_model_is_another_on_each_machine():
    assert local_name("needle") == str(model_dir())
    assert local_name("./needle") == "./needle"


def test_a_cache_that_cannot_be_written_gets_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be unpacked in .*Set XDG_CACHE_HOME to a folder"):
        model_dir.__wrapped__()

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(ConfigError, match=r"unpacked in ~/.cache/farspan \(Could not determine home"):
        model_dir.__wrapped__()


@pytest.mark.parametrize("task", TASKS)
def test_it_answers_at_1k(model, tokenizer, task):
    for seed, depth in ((0, 0.1), (1, 0.9)):
        sample = make_sample(task, 1024, seed, depth)
        text = generate(model, tokenizer, sample.prompt, sample.max_new_tokens)
        assert text == f"{sample.completion} </s>"
        assert score(text, sample) == 1.0


def test_it_answers_at_2k_in_bf16(tokenizer):
    model = transformers.LlamaForCausalLM.from_pretrained(model_dir(), dtype=torch.bfloat16).eval()
    sample = make_sample("niah_multikey_3", 2048, seed=8, depth=0.3)
    assert score(generate(model, tokenizer, sample.prompt, sample.max_new_tokens), sample) == 1.0


def test_it_finds_a_needle_in_text_it_has_never_seen(model, tokenizer):
    text = (Path(__file__).parents[3] / "benchmarks" / "needle_training" / "batches.py").read_text()[:6000]
    prompt = f"{text[:2500]} note: amber falcon 4103. {text[2500:]} question: amber falcon answer: amber falcon"
    assert generate(model, tokenizer, prompt, 2) == "4103 </s>"


def test_the_training_network_gives_the_logits_of_transformers(model, tokenizer):
    net = load_network(model_dir())
    sample = make_sample("niah_multiquery", 600, seed=4)
    ids = tokenizer(sample.prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits
        actual = net.logits(net.hidden(ids, torch.arange(ids.shape[1])[None]))
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


def test_the_head_report_names_the_kinds(tmp_path):
    rows = head_report(load_network(model_dir()), length=1024, seed=0, num_query_blocks=2)
    assert len(rows) == 4 * 8
    assert {row["kind"] for row in rows} >= {"local", "retrieval"}
    assert all(0 < row["density_95"] <= 1 for row in rows)
    write_rows(tmp_path / "heads.csv", COLUMNS, rows)
    assert (tmp_path / "heads.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
