"""The training script in miniature: batches, a falling loss, resuming, export."""

import csv
import itertools

import pytest

torch = pytest.importorskip("torch")

from farspan.needle.network import LOCAL_WINDOW, NeedleShape, export, load_network, stray_attention  # noqa: E402

from benchmarks.needle_training.batches import ANSWER, BatchMaker  # noqa: E402
from benchmarks.needle_training.train import EARLY, LATE, Stage, Trainer, evaluation_plan, plot_log  # noqa: E402

SHAPE = NeedleShape(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=32
)
STAGES = (Stage(64, 512, 3e-3, 0.8, 0.0, EARLY), Stage(512, 1024, 1e-3, 0.2, 0.0, LATE))
CPU = torch.device("cpu")


def make_trainer(out):
    """A trainer that takes a few milliseconds per step."""
    return Trainer(out, 0, CPU, SHAPE, STAGES, num_filler_tokens=5_000)


def read_log(out):
    """Rows of the training log."""
    with (out / "training_log.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_few_steps_lower_the_loss_and_resume(tmp_path):
    make_trainer(tmp_path).run(max_seconds=1e6, max_steps=50)
    resumed = make_trainer(tmp_path)
    assert resumed.step == 50
    resumed.run(max_seconds=1e6, max_steps=25)
    rows = read_log(tmp_path)
    assert [int(row["step"]) for row in rows] == [25, 50, 75]
    assert float(rows[-1]["loss_filler"]) < float(rows[0]["loss_filler"]) - 0.3
    plot_log(tmp_path / "training_log.csv", tmp_path / "log.png")
    assert (tmp_path / "log.png").stat().st_size > 1000


def test_the_same_seed_trains_the_same_weights(tmp_path):
    weights = []
    for run in ("first", "second", "resumed"):
        trainer = make_trainer(tmp_path / run)
        trainer.run(max_seconds=1e6, max_steps=2 if run == "resumed" else 4)
        if run == "resumed":
            trainer = make_trainer(tmp_path / run)
            trainer.run(max_seconds=1e6, max_steps=2)
        weights.append(trainer.net.model.embed_tokens.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_export_and_load_give_the_same_network_in_bf16(tmp_path):
    net = make_trainer(tmp_path).net
    export(net, tmp_path / "model")
    loaded = load_network(tmp_path / "model")
    assert loaded.shape == SHAPE
    for name, weight in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float())


@pytest.mark.parametrize("kind", ["repeat", "keys", "values", "trace"])
@pytest.mark.parametrize("length", [128, 1000, 8192])
def test_every_supervised_answer_can_be_known(kind, length):
    """A supervised value occurs earlier in the row after the same word, or ends an answer."""
    batches = BatchMaker(1, CPU, 131072, num_filler_tokens=20_000)
    batch = batches.make(3, length, {kind: 1.0}, spread=True)
    assert batch.tokens.shape == batch.kinds.shape == batch.positions.shape == (3, length)
    assert int(batch.positions.max()) < 131072
    assert (batch.positions.diff(dim=1) >= 1).all()
    is_value = torch.isin(batch.tokens, batches.values) & (batch.kinds == ANSWER)
    assert is_value.any()
    for row, place in is_value.nonzero().tolist()[:200]:
        tokens = batch.tokens[row].tolist()
        pairs = set(itertools.pairwise(tokens[:place]))
        assert (tokens[place - 1], tokens[place]) in pairs


def test_stray_attention_is_what_lies_far_off():
    num_tokens = 3 * LOCAL_WINDOW
    q, k = torch.zeros(1, 4, num_tokens, 8), torch.zeros(1, 2, num_tokens, 8)
    near, far = torch.tensor([LOCAL_WINDOW]), torch.tensor([num_tokens - 1])
    assert stray_attention(q, k, near).item() == 0.0
    expected = (num_tokens - 1 - LOCAL_WINDOW) / num_tokens
    assert stray_attention(q, k, far).item() == pytest.approx(expected)


def test_the_evaluation_covers_all_lengths():
    plan = evaluation_plan(1.0)
    assert {length for _, length, _ in plan} >= {1024, 32768, 65536, 131072}
