"""Train the needle model: `python -m benchmarks.needle_training.train --out DIR`. Seeded, resumable, bf16 on a GPU.

Lengths rise when the loss on values says so (or a stage's share of the time is over), with shorter rows mixed in.
`DIR` receives checkpoint.pt, training_log.csv, the model folder `model/` and, where asked for, evaluation.csv.
"""

import argparse
import math
import random
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from farspan.command import device, make_folder, run_command
from farspan.needle.evaluate import COLUMNS, evaluate, submit_samples, summarise
from farspan.needle.network import NeedleNet, NeedleShape, export, load_network
from farspan.tables import append_rows, read_rows, write_rows

from .batches import ANSWER, FILLER, NUM_FILLER_TOKENS, Batch, BatchMaker

PROGRAM = "python -m benchmarks.needle_training.train"
LOG_COLUMNS = (
    "step", "seconds", "tokens", "stage", "length", "learning_rate", "loss_repeat", "loss_value", "accuracy_value",
    "loss_filler", "stray_attention", "grad_norm",
)  # fmt: skip
MEASURES = LOG_COLUMNS[-6:]
FILLER_WEIGHT = 0.2
# Idle heads of large models attend to the first token and to tokens nearby. Without this small cost, those of a small
# model attend to the whole prompt, which changes no answer but does not occur in models that sparse methods serve.
STRAY_WEIGHT = 0.1
STRAY_MIN_LENGTH = 512
NUM_STRAY_QUERIES = 32
WARMUP_STEPS = 100
LOG_EVERY_STEPS = 25
LOG_EVERY_SECONDS = 5
SAVE_EVERY_SECONDS = 30


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum. It ends at `enough_loss` on values (or at its share of the time, at the latest)."""

    length: int
    batch_tokens: int
    learning_rate: float
    share: float
    enough_loss: float
    mix: dict[str, float]


EARLY = {"repeat": 0.5, "keys": 0.3, "values": 0.1, "trace": 0.1}
MIDDLE = {"repeat": 0.1, "keys": 0.5, "values": 0.2, "trace": 0.2}
LATE = {"keys": 0.7, "values": 0.15, "trace": 0.15}
LONGEST_MIDDLE = 1024  # rows up to here keep MIDDLE's repetitions to the end
STAGES = (
    Stage(128, 32768, 2e-3, 0.12, 0.03, EARLY),
    Stage(256, 65536, 2e-3, 0.08, 0.015, MIDDLE),
    Stage(1024, 65536, 1.5e-3, 0.12, 0.003, MIDDLE),
    Stage(4096, 131072, 1e-3, 0.16, 0.001, LATE),
    Stage(16384, 131072, 7e-4, 0.15, 0.0005, LATE),
    Stage(32768, 131072, 5e-4, 0.15, 0.0005, LATE),
    Stage(131072, 131072, 3e-4, 0.22, 0.0, LATE),
)


class Trainer:
    """Owns the network, optimiser, data and log; `run` mutates all of them until the time is over."""

    def __init__(
        self,
        out: Path,
        seed: int,
        device: torch.device,
        shape: NeedleShape,
        stages: tuple[Stage, ...],
        num_filler_tokens: int = NUM_FILLER_TOKENS,
    ):
        """Start from the seed, or from `out/checkpoint.pt` where there is one."""
        torch.manual_seed(seed)
        self.out, self.device, self.stages = out, device, stages
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.net = NeedleNet(shape, dtype).to(device)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.batches = BatchMaker(seed, device, shape.max_position_embeddings, num_filler_tokens)
        self.lengths = random.Random(seed + 1)
        self.step, self.tokens, self.stage_index, self.seconds, self.stage_seconds = 0, 0, 0, 0.0, 0.0
        self.stage_step = 0
        out.mkdir(parents=True, exist_ok=True)
        self.log_path = out / "training_log.csv"
        if (out / "checkpoint.pt").exists():
            self._load()
        else:
            write_rows(self.log_path, LOG_COLUMNS, [])

    def run(self, max_seconds: float, max_steps: int | None = None) -> None:
        """Train until `max_seconds` in all (earlier runs counted), or for `max_steps` more steps."""
        before, started = self.seconds, time.monotonic()
        logged = saved = started
        stage_before = self.stage_seconds
        last_step = math.inf if max_steps is None else self.step + max_steps
        measured: dict[int, list[torch.Tensor]] = defaultdict(list)
        recent_loss = math.inf
        while self.seconds < max_seconds and self.step < last_step:
            stage = self.stages[self.stage_index]
            length = self._draw_length(stage)
            rate = self._learning_rate(stage, max_seconds)
            measured[length].append(self._train_step(stage, length, rate))
            self.step += 1
            self.stage_step += 1
            self.tokens += stage.batch_tokens
            is_due = self.step % LOG_EVERY_STEPS == 0 or time.monotonic() - logged > LOG_EVERY_SECONDS
            if not is_due and self.step < last_step:
                continue
            rows = self._write_log(measured, rate)
            measured.clear()
            now = logged = time.monotonic()
            self.seconds = before + now - started
            self.stage_seconds = stage_before + now - started
            if stage.length in rows:
                loss = rows[stage.length]["loss_value"]
                recent_loss = loss if recent_loss == math.inf else 0.5 * (recent_loss + loss)
            enough = recent_loss < stage.enough_loss and self.stage_step >= 2 * LOG_EVERY_STEPS
            is_last = self.stage_index == len(self.stages) - 1
            if not is_last and (enough or self.seconds > max_seconds * self._stage_end(self.stage_index)):
                self.stage_index += 1
                self.stage_step, self.stage_seconds, stage_before = 0, 0.0, started - now
                recent_loss = math.inf
            if now - saved > SAVE_EVERY_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the last one intact."""
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.step, self.tokens, self.stage_index, self.seconds, self.stage_seconds, self.stage_step),
            "random": (self.batches.rng.getstate(), self.batches.generator.get_state(), self.lengths.getstate()),
        }
        torch.save(state, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")

    def _load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=False)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
        self.step, self.tokens, self.stage_index, self.seconds, self.stage_seconds, self.stage_step = progress
        batches, generator, lengths = state["random"]
        self.batches.rng.setstate(batches)
        self.batches.generator.set_state(generator.cpu())
        self.lengths.setstate(lengths)

    def _stage_end(self, stage_index: int) -> float:
        """Share of the time after which the stage is over at the latest."""
        return sum(stage.share for stage in self.stages[: stage_index + 1]) / sum(stage.share for stage in self.stages)

    def _draw_length(self, stage: Stage) -> int:
        if self.stage_index == 0 or self.lengths.random() < 0.7:
            return stage.length
        return self.lengths.choice([earlier.length for earlier in self.stages[: self.stage_index]])

    def _learning_rate(self, stage: Stage, max_seconds: float) -> float:
        """Warm up, hold the stage's rate, and fall to a tenth of it over the last fifth of the time."""
        left = max(0.0, 1.0 - self.seconds / max_seconds)
        return stage.learning_rate * min(1.0, (self.step + 1) / WARMUP_STEPS) * (0.1 + 0.9 * min(1.0, left / 0.2))

    def _train_step(self, stage: Stage, length: int, rate: float) -> torch.Tensor:
        """One optimiser step; the measures of the log, on the device, without waiting for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        num_rows = max(1, stage.batch_tokens // length)
        mix = MIDDLE if stage.mix is LATE and length <= LONGEST_MIDDLE else stage.mix
        batch = self.batches.make(num_rows, length, mix, spread=length >= 512)
        loss, measures = loss_of(self.net, self.batches, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return torch.cat((measures, grad_norm.detach().float()[None]))

    def _write_log(self, measured: dict[int, list[torch.Tensor]], rate: float) -> dict[int, dict]:
        rows = {}
        for length, steps in sorted(measured.items()):
            means = torch.stack(steps).nanmean(dim=0).tolist()
            rows[length] = dict(zip(MEASURES, means, strict=True))
        lines = []
        for length, row in rows.items():
            head = (self.step, round(self.seconds, 1), self.tokens, self.stage_index, length, f"{rate:.2e}")
            measures = ("" if math.isnan(row[name]) else f"{row[name]:.4g}" for name in MEASURES)
            lines.append(dict(zip(LOG_COLUMNS, (*head, *measures), strict=True)))
        append_rows(self.log_path, LOG_COLUMNS, lines)
        return rows


def loss_of(net: NeedleNet, batches: BatchMaker, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Training loss, and the measures up to `stray_attention`, NaN where a batch has none."""
    length = batch.tokens.shape[1]
    sampled = batches.places(NUM_STRAY_QUERIES, length) if length >= STRAY_MIN_LENGTH else None
    hidden, stray = net.hidden_and_stray(batch.tokens, batch.positions, sampled)
    logits = net.logits(hidden[:, :-1]).float()
    target, kinds = batch.tokens[:, 1:], batch.kinds[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    is_answer, is_filler = kinds == ANSWER, kinds == FILLER
    is_value = is_answer & torch.isin(target, batches.values)
    has_questions = torch.arange(len(target), device=target.device)[:, None] >= batch.num_repeat_rows
    # Not _mean: a row packed with needles has no filler, and 0/0 would reach the gradients.
    total = (loss * is_answer).sum() / is_answer.sum().clamp(min=1)
    total = total + FILLER_WEIGHT * (loss * is_filler).sum() / is_filler.sum().clamp(min=1)
    if stray is not None:
        total = total + STRAY_WEIGHT * stray
    with torch.no_grad():
        is_right = (logits.argmax(dim=-1) == target).float()
        measures = torch.stack(
            (
                _mean(loss, is_answer & ~has_questions),
                _mean(loss, is_value & has_questions),
                _mean(is_right, is_value & has_questions),
                _mean(loss, is_filler),
                loss.new_tensor(torch.nan) if stray is None else stray,
            )
        )
    return total, measures


def plot_log(log_path: Path, picture_path: Path) -> None:
    """Draw value loss, value accuracy and length against steps from the log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_rows(log_path, LOG_COLUMNS) if row["loss_value"]]
    lengths = sorted({int(row["length"]) for row in rows})
    figure, axes = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    colors = plt.get_cmap("viridis")
    for place, length in enumerate(lengths):
        points = [row for row in rows if int(row["length"]) == length]
        steps = [int(row["step"]) for row in points]
        color = colors(place / max(1, len(lengths) - 1))
        axes[0].plot(steps, [max(1e-5, float(row["loss_value"])) for row in points], ".-", ms=3, lw=0.8, color=color)
        errors = [max(1e-5, 1 - float(row["accuracy_value"])) for row in points]
        axes[1].plot(steps, errors, ".-", ms=3, lw=0.8, color=color, label=f"{length} tokens")
    axes[0].set(yscale="log", ylabel="loss on values (nats)", title="Needle model: training")
    axes[1].set(yscale="log", ylabel="share of values wrong (none: 1e-5)", xlabel="step")
    axes[1].legend(ncols=2, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    picture_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture_path, dpi=90)
    plt.close(figure)


def evaluation_plan(scale: float) -> list[tuple[str, int, int]]:
    """(task, length, count): single needles everywhere, all tasks to 32K, fewer samples beyond."""
    multi = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery")
    plan = []
    for length in (1024, 4096, 8192, 16384, 32768, 65536, 131072):
        single, other = (200, 100) if length <= 32768 else (100, 20)
        plan.append(("niah_single", length, max(2, round(single * scale))))
        plan += [(task, length, max(2, round(other * scale))) for task in (*multi, "variable_tracking")]
    return plan


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-minutes", type=float, default=7.0, help="training time in all, resumed runs included")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--rate-factor", type=float, default=1.0, help="factor on every learning rate")
    parser.add_argument("--rope-theta", type=float, default=NeedleShape.rope_theta)
    parser.add_argument(
        "--evaluate", type=float, default=0.0, metavar="SCALE", help="evaluate; at 1 with 100-200 samples a cell"
    )
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    return run_command(PROGRAM, lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Train, export, and evaluate where asked."""
    make_folder(args.out)
    train_on = torch.device(args.device)
    shape = NeedleShape(rope_theta=args.rope_theta)
    stages = tuple(
        Stage(s.length, s.batch_tokens, s.learning_rate * args.rate_factor, s.share, s.enough_loss, s.mix)
        for s in STAGES
    )
    with ProcessPoolExecutor(10, mp_context=get_context("spawn")) as pool:
        samples = submit_samples(pool, evaluation_plan(args.evaluate), first_seed=10_000) if args.evaluate else []
        trainer = Trainer(args.out, args.seed, train_on, shape, stages)
        trainer.run(60 * args.max_minutes, args.max_steps)
        export(trainer.net, args.out / "model")
        if samples:
            net = load_network(args.out / "model", train_on, trainer.net.dtype)
            rows = summarise(evaluate(net, samples))
            write_rows(args.out / "evaluation.csv", COLUMNS, rows)
            for row in rows:
                print(*row.values())


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values` where `mask`, NaN where there is nothing."""
    return (values * mask).sum() / mask.sum()


if __name__ == "__main__":
    sys.exit(main())
