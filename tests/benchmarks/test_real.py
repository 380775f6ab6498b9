"""The rules that benchmark `real` puts beside flex, and the table of its rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from farspan.engine_ext.config import FlexPrefill
from farspan.engine_ext.launch import ON_HOST
from farspan.engine_ext.selection.methods import Chunks
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.oracle import block_mass, kept_mass
from farspan.kernels.tiles import make_prefill_tiles

from benchmarks.real import WORKER, Inputs, engine_settings, local_blocks, pieces_of
from benchmarks.real_table import QUESTIONS, format_real
from benchmarks.real_worker import RuleSelector, oracle_lists
from benchmarks.record import BenchmarkError, Environment, Recorder

CPU = torch.device("cpu")


def test_the_oracle_keeps_gamma_with_the_fewest_blocks() -> None:
    torch.manual_seed(0)
    num_tokens, num_heads, gamma = 900, 4, 0.9
    query = 6 * torch.randn(num_tokens, num_heads, 16)
    kv = KVView(torch.randn(8, 2, 128, 32))
    batch = PagedBatch(
        torch.tensor([0, num_tokens], dtype=torch.int32),
        torch.tensor([num_tokens], dtype=torch.int32),
        torch.arange(8, dtype=torch.int32)[None],
        num_tokens,
        num_tokens,
    )
    tiles = make_prefill_tiles([0, num_tokens], [num_tokens], 128, CPU)
    mass = block_mass(query, kv, batch, tiles, 0.25, dtype=torch.float32)
    lists = oracle_lists(mass, tiles, gamma, 1)
    kept = kept_mass(mass, lists)
    assert bool((kept >= gamma - 1e-5).all())
    # One block fewer, the least of those that may go, would keep less.
    for head in range(num_heads):
        for tile, own in enumerate(tiles.tile_block.tolist()):
            ids = lists.block_ids[head, tile, : lists.block_counts[head, tile]].tolist()
            assert ids == sorted(set(ids))
            assert {0, own} <= set(ids) <= set(range(own + 1))
            free = [float(mass[head, tile, block]) for block in ids if block not in (0, own)]
            if free:
                assert kept[head, tile] - min(free) < gamma
    assert bool((oracle_lists(mass, tiles, 0.1, 3).block_counts == (tiles.tile_block + 1).clamp(max=3)).all())
    selector = RuleSelector(SelectionStats(num_heads, CPU))
    selector.rule = "oracle"
    prefill = FlexPrefill(gamma=gamma, min_budget=0)
    chosen = selector.block_lists(prefill, Chunks(query, kv, batch, tiles, 0.25, None), ON_HOST)
    assert torch.equal(chosen.block_counts, lists.block_counts)
    assert selector.stats is not None
    assert float(selector.stats.listed_blocks.sum()) == float(lists.block_counts.sum())


@pytest.mark.parametrize("density", [0.1, 0.44, 0.9, 1.0])
def test_as_many_local_blocks_as_a_density_needs(density: float) -> None:
    def read(local: int) -> float:
        return sum(min(tile + 1, local + 1) for tile in range(64)) / (64 * 65 / 2)

    local = local_blocks(8192, density)
    assert read(local) >= density
    assert local == 1 or read(local - 1) < density


def test_rows_may_drift_either_way_and_make_a_table() -> None:
    recorder = Recorder(None, Environment("r1", "2026-11-28", "c", "cpu", "", "2", "3", "0.32"))
    for variant, drift in (("farspan-g0.95", -0.004), ("oracle-g0.95", 0.001)):
        for metric in ("density", "coverage", "coverage_min", "below_gamma_0.01", "below_gamma_0.05", "changed"):
            recorder.add("real", "n8192-m-fp32", variant, metric, "fraction", [0.25])
        recorder.add("real", "n8192-m-fp32", variant, "drift", "nats/token", [drift])
        recorder.add("real", "n8192-m-fp32", variant, "drift_error", "nats/token", [0.001])
    with pytest.raises(BenchmarkError, match="samples"):
        recorder.add("real", "n8192-m-fp32", "farspan", "drift", "nats/token", [float("nan")])
    table = format_real([*(replace(row, run_id="r0", p50="9") for row in recorder.rows), *recorder.rows])
    assert "| farspan-g0.95 | 0.250 | 0.250 | 0.250 | 25.0 % | 25.0 % | −0.0040 ± 0.0010 | 25.00 % |" in table
    assert "r0" not in table
    on_gpu = [replace(row, gpu="some GPU", case=row.case.replace("fp32", "bf16")) for row in recorder.rows]
    assert "fp32" not in format_real([*recorder.rows, *on_gpu])
    later = [replace(row, run_id="r2", gpu="new GPU", vllm="0.33", case="n99999-m-bf16") for row in on_gpu]
    heading = format_real([*on_gpu, *later]).splitlines()[0]
    assert heading.endswith("; some GPU, vLLM 0.32 (r1); new GPU, vLLM 0.33 (r2)")
    assert format_real([]) == ""


def test_the_table_has_the_needles_that_were_found() -> None:
    recorder = Recorder(None, Environment("r1", "2026-11-28", "c", "cpu", "", "2", "3", "0.32"))
    for metric in ("density", "coverage", "coverage_min", "below_gamma_0.01", "below_gamma_0.05", "changed"):
        recorder.add("real", "n8192-m-fp32", "farspan-g0.95", metric, "fraction", [0.25])
    for metric in ("drift", "drift_error"):
        recorder.add("real", "n8192-m-fp32", "farspan-g0.95", metric, "nats/token", [0.001])
    for variant, task, share in (("farspan", QUESTIONS[0], 1.0), ("farspan", QUESTIONS[2], 0.5)):
        recorder.add("real", f"n8192-m-fp32-{task}", variant, "accuracy", "fraction", [share])
    recorder.add("real", f"n8192-m-fp32-{QUESTIONS[1]}", "farspan-g0.95", "accuracy", "fraction", [0.8])
    dense, flex = format_real(recorder.rows).splitlines()[-2:]
    assert dense.endswith("| 0.00 % | 100 / – / 50 | r1 |")
    assert flex.endswith("| 25.00 % | – / 80 / – | r1 |")
    # Those of a later run take the place of earlier ones, and the run is named.
    again = replace(recorder.rows[-1], run_id="r2", p50="0.9")
    assert "| – / 90 / – | r1; needles r2 |" in format_real([*recorder.rows, again])


def test_questions_alone_read_no_texts(tmp_path: Path) -> None:
    inputs = Inputs("needle", (tmp_path / "none",), "needle", (2048, 4096), 0, 1)
    settings, _ = engine_settings(inputs, "tile_rows", 1024)
    assert pieces_of(inputs, settings) == {2048: [], 4096: []}


@pytest.mark.parametrize("selection", ["tile_rows", "flexprefill"])
def test_an_engine_has_the_worker_that_changes_rules(selection: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some text")
    inputs = Inputs("needle", (text,), "needle", (2048,), 1, 0, engine_args={"gpu_memory_utilization": 0.2})
    settings, prefill = engine_settings(inputs, selection, 1024)
    assert settings.engine_args["worker_extension_cls"] == WORKER
    assert settings.engine_args["gpu_memory_utilization"] == 0.2
    assert prefill.selection == selection
    assert prefill.min_seq_len == 0
