"""`farspan eval`: what it refuses, what it writes, how it goes on; with a model of the test's own."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from farspan.cli import main
from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.evaluate import (
    EvalSettings,
    Model,
    all_cells,
    check_settings,
    engine_arguments,
    estimate,
    make_samples,
    method_options,
    prompt_room,
    run_eval,
)
from farspan.evaluation.plots import draw_plots
from farspan.evaluation.reading import estimate_s
from farspan.evaluation.results import ACCURACY_COLUMNS, CSV_COLUMNS, Cell, format_table, read_csv, remarks
from farspan.needle import model_dir
from farspan.needle.tasks import TASKS


class StubModels:
    """Opens models that answer right, except for prompts longer than `limit` tokens; counts what it is asked."""

    def __init__(self, limit=10**9, selection=None):
        self.selection = selection
        self.limit = limit
        self.opened = []
        self.prompts = []

    @contextmanager
    def __call__(self, settings, options):
        self.opened.append(options)

        def generate(samples):
            self.prompts += [sample.prompt for sample in samples]
            return [sample.completion if sample.length <= self.limit else "nothing" for sample in samples]

        yield Model(generate, self.selection)


def settings(out, **changes):
    defaults = {"model": "needle", "tasks": ("niah_single",), "lengths": (256, 512), "out": out, "count": 3}
    return EvalSettings(**(defaults | changes))


def test_every_cell_becomes_a_row(tmp_path):
    wanted = settings(
        tmp_path, methods=("stock", "dense"), depths=(0.0, 1 / 3), tasks=("niah_single", "niah_multivalue")
    )
    cells = run_eval(wanted, StubModels(limit=256))
    assert [(cell.method, cell.task, cell.length, cell.depth) for cell in cells] == [
        (method, task, length, depth)
        for method in ("stock", "dense")
        for task in ("niah_single", "niah_multivalue")
        for length in (256, 512)
        for depth in (0.0, 1 / 3)
    ]
    assert [cell.accuracy for cell in cells] == [1.0, 1.0, 0.0, 0.0] * 4
    lines = (tmp_path / "eval.csv").read_text().splitlines()
    assert lines[0] == ",".join(CSV_COLUMNS)
    assert lines[0] == "method,task,length,depth,seed,count,accuracy,density,coverage,coverage_worst,note"
    assert lines[1] == "stock,niah_single,256,0.0,0,3,1.0,,,,"
    assert read_csv(tmp_path / "eval.csv") == cells


def test_a_run_goes_on_where_it_stopped(tmp_path):
    first, second = StubModels(), StubModels()
    run_eval(settings(tmp_path, methods=("dense",)), first)
    cells = run_eval(settings(tmp_path, methods=("dense", "flex"), lengths=(256, 512, 1024)), second)
    assert len(cells) == 6
    assert len(first.prompts) == 2 * 3
    assert len(second.prompts) == 4 * 3
    again = StubModels()
    assert run_eval(settings(tmp_path, methods=("dense", "flex"), lengths=(256, 512, 1024)), again) == cells
    assert again.opened == []


def test_the_same_settings_ask_the_same_questions(tmp_path):
    asked = []
    for folder in ("a", "b"):
        models = StubModels()
        run_eval(settings(tmp_path / folder), models)
        asked.append(models.prompts)
    assert asked[0] == asked[1]
    other = StubModels()
    run_eval(settings(tmp_path / "c", seed=1), other)
    assert not set(asked[0]) & set(other.prompts)


@pytest.mark.parametrize(
    "changes",
    [{"chunk": 512}, {"engine_args": {"dtype": "float32"}}, {"options": {"kernel": "triton"}}],
    ids=["chunk", "engine", "options"],
)
def test_results_of_other_settings_are_not_mixed(tmp_path, changes):
    run_eval(settings(tmp_path), StubModels())
    with pytest.raises(ConfigError, match="choose another --out"):
        run_eval(settings(tmp_path, **changes), StubModels())


def test_options_go_to_all_methods_or_by_name(tmp_path):
    gamma = {"prefill": {"gamma": 0.8}}
    assert method_options("stock", settings(tmp_path, methods=("stock",))) is None
    flex = settings(tmp_path, methods=("flex",), options=gamma)
    # Sparse at any length: models this small would otherwise always be dense.
    always = {"method": "flex", "min_seq_len": 0, "min_chunk_len": 0, "coverage_rows": 8}
    assert method_options("flex", flex) == {"prefill": {**always, "gamma": 0.8}}
    named = settings(
        tmp_path,
        methods=("dense", "flex-g0.8"),
        options={"flex-g0.8": {"prefill": {"method": "flex", "gamma": 0.8}}},
    )
    assert method_options("flex-g0.8", named) == {"prefill": {"method": "flex", "gamma": 0.8}}
    assert method_options("dense", named) == {"prefill": {"method": "dense"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "not a folder with a config.json"),
        (["--tasks", "niah_double"], f"known tasks are {', '.join(TASKS)}"),
        (["--tasks", ""], "tasks is empty"),
        (["--methods", "magic"], "known methods are stock, dense, flex, block_sparse, string"),
        (["--lengths", "100"], "at least 256 and at most 130944"),
        (["--lengths", "262144"], "at least 256 and at most 130944"),
        (["--depths", "1.5"], "between 0 "),
        (["--count", "0"], "at least 1"),
        (["--chunk", "0"], "at least 1 token"),
        (["--seed", "-1"], "at least 0"),
        (["--methods", "flex", "--options", '{"prefill": {"gamma": 2}}'], "gamma=2"),
    ],
    ids=["model", "task", "no-task", "method", "short", "long", "depth", "count", "chunk", "seed", "options"],
)
def test_mistakes_get_a_sentence(tmp_path, capsys, arguments, message):
    assert main(["eval", "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("farspan eval: ")
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_the_models_own_can_be_asked_for(tmp_path):
    engine_args = {"hf_overrides": {"max_position_embeddings": 262144}}
    check_settings(settings(tmp_path, lengths=(262144 - 128,), engine_args=engine_args))


def test_a_prompt_leaves_room_for_the_answer(tmp_path):
    with pytest.raises(ConfigError, match="at most 130944: max_position_embeddings less 128 for the answer"):
        check_settings(settings(tmp_path, lengths=(131072,)))


@pytest.mark.parametrize(
    "arguments", [["--lengths", "1k"], ["--options", "{"], ["--options", "[]"], ["--depths", "top"]]
)
def test_malformed_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["eval", *arguments])
    assert "argument --" in capsys.readouterr().err


def test_table_and_pictures(tmp_path):
    cells = [
        Cell(method, "niah_single", length, depth, 0, 5, accuracy)
        for method, accuracy in (("dense", 1.0), ("flex", 0.75))
        for length in (1024, 2048)
        for depth in (0.0, 0.5, 1.0)
    ]
    table = format_table(cells)
    assert table.splitlines()[0].split() == ["method", "task", "1024", "2048"]
    assert table.splitlines()[2].split() == ["flex", "niah_single", "75.0", "75.0"]
    files = draw_plots(cells, tmp_path)
    assert [path.name for path in files] == [
        "accuracy.png",
        "heatmap-dense-niah_single.png",
        "heatmap-flex-niah_single.png",
    ]
    before = [path.read_bytes() for path in files]
    assert all(content.startswith(b"\x89PNG") for content in before)
    assert [path.read_bytes() for path in draw_plots(cells, tmp_path)] == before


def test_words_are_measured_with_the_models_own_tokenizer(tmp_path, model_dirs):
    wanted = settings(tmp_path, model=str(model_dirs("llama")), lengths=(1024,), questions="words")
    cell = Cell("dense", "niah_single", 1024, None, 0, 2)
    for sample in make_samples(wanted, cell):
        assert sample.max_new_tokens >= 32


def test_density_and_coverage_of_sparse_methods_have_columns(tmp_path):
    rows = [{"density": 0.2, "coverage": 0.9}, {"density": 0.4, "coverage": 1.0}]
    models = StubModels(selection=iter([rows, []]).__next__)
    flex, dense = run_eval(settings(tmp_path / "flex", methods=("flex",)), models)
    assert (flex.density, flex.coverage, flex.coverage_worst, flex.note) == (0.3, 0.95, 0.9, "")
    assert (dense.density, dense.note) == (None, "ran densely")
    assert read_csv(tmp_path / "flex" / "eval.csv") == [flex, dense]
    [remark] = remarks([flex, dense])
    assert remark.startswith("flex ran densely on niah_single at 512 tokens")
    table = format_table([flex, dense]).splitlines()
    assert table[3].split() == ["method", "task", "256", "density"]
    assert table[4].split() == ["flex", "niah_single", "0.300"]
    # 2 tiles of 128 read blocks 1 and 1 to 2 of as many; 4 tiles 1, 2, 2, 2 of 1 to 4.
    options = {"prefill": {"pattern": "sink_local", "sink_blocks": 0, "local_blocks": 2, "block_size": 128}}
    static = run_eval(settings(tmp_path / "static", methods=("block_sparse",), options=options), StubModels())
    assert [cell.density for cell in static] == [1.0, 0.7]


def test_a_model_that_fails_itself_gets_a_warning():
    cells = [Cell(method, "niah_single", 1024, None, 0, 5, 0.4) for method in ("stock", "flex")]
    [remark] = remarks(cells)
    assert remark.startswith("warning: stock answers 40 % of niah_single at 1024 tokens")
    assert remarks([replace(cells[0], accuracy=0.5), cells[1]]) == []


def test_the_time_is_told_before_the_first_cell(tmp_path, capsys):
    wanted = settings(tmp_path, methods=("stock", "dense"), lengths=(512, 1024), count=10)
    run_eval(wanted, StubModels())
    assert "for 4 cells of 10 questions" in capsys.readouterr().err
    first = estimate_s(str(model_dir()), [512], 10, 3.0, 512)
    assert first == pytest.approx(30.0)
    # Attention grows with the square.
    assert 2 * first < estimate_s(str(model_dir()), [1024], 10, 3.0, 512) < 4 * first
    said = estimate(wanted, list(all_cells(wanted)), 60.0, 600.0)
    assert said.startswith("about 82 minutes for 4 cells of 10 questions")


def test_tables_of_accuracies_alone_are_read_but_not_gone_on_with(tmp_path):
    run_eval(settings(tmp_path), StubModels())
    path = tmp_path / "eval.csv"
    lines = [line.removesuffix(",,,,") for line in path.read_text().splitlines()]
    path.write_text("\n".join([",".join(ACCURACY_COLUMNS), *lines[1:], ""]))
    assert [cell.accuracy for cell in read_csv(path)] == [1.0, 1.0]
    with pytest.raises(ConfigError, match="does not have the columns"):
        run_eval(settings(tmp_path), StubModels())


NEEDLE_TOKEN_BYTES = 2 * 4 * 2 * 64 * 4
"""Of keys and values: layers, KV heads, head size, float32."""


@pytest.mark.parametrize(
    ("changes", "num_seqs", "max_len"),
    [
        ({"count": 3}, 3, 640),
        ({"count": 50}, 8, 640),
        ({"count": 50, "chunk": 2}, 2, 640),
        ({"count": 50, "lengths": (256, 130944)}, 7, 131072),
        ({"count": 2, "engine_args": {"max_model_len": 4096}}, 2, 4096),
    ],
    ids=["few", "many", "chunk", "long", "own-length"],
)
def test_memory_on_a_cpu_is_what_the_prompts_need(tmp_path, changes, num_seqs, max_len):
    room = prompt_room(settings(tmp_path, **changes))
    assert room["max_num_seqs"] == num_seqs
    tokens = num_seqs * max_len
    assert tokens <= room["kv_cache_memory_bytes"] / NEEDLE_TOKEN_BYTES <= tokens + 128 * (num_seqs + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU platform")
@pytest.mark.parametrize("given", [{"gpu_memory_utilization": 0.3}, {"kv_cache_memory_bytes": 2**20}])
def test_the_users_own_memory_arguments_stand(tmp_path, given):
    arguments = engine_arguments(settings(tmp_path, engine_args=given), None)
    assert arguments.items() >= given.items()
    assert "max_num_seqs" not in arguments
    assert arguments["max_model_len"] == 640
