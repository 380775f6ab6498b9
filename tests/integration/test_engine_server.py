"""The OpenAI server with farspan, driven by the `openai` client."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from farspan.metrics import EXTENSION

from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

START_LIMIT_S = 300
DASHBOARD = Path(__file__).resolve().parents[2] / "examples" / "grafana.json"
PROMPTS = make_prompts((5, 300, 900), seed=11)


@contextmanager
def serving(model: Path, tmp_path: Path, options: dict[str, Any], *more: str) -> Iterator[tuple[Any, Path]]:
    """An `openai` client of a running server with these options of farspan, and the server's log."""
    import openai

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--attention-backend", "CUSTOM", "--served-model-name", "tiny", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--max-num-batched-tokens", "256", "--max-num-seqs", "16", "--num-gpu-blocks-override", "128"]
    command += ["--additional-config", json.dumps({"farspan": options}), *more]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            wait_until_up(client, process, log)
            yield client, log
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture
def server(model_dirs: Callable[[str], Path], tmp_path: Path) -> Iterator[Any]:
    """An `openai` client of a running server; the server's log must name our backend."""
    # Sparse prefill that lists every block, so that its tokens are those of exact attention.
    prefill = {"gamma": 1.0, "min_seq_len": 0, "min_chunk_len": 0}
    options = {"preset": "fast", "prefill": prefill, "offload": {"host_memory": 0.2}}
    with serving(model_dirs("llama"), tmp_path, options, "--worker-extension-cls", EXTENSION) as (client, log):
        yield client
        check_start_line(log.read_text())


def check_start_line(log: str) -> None:
    """One line says what was decided, in JSON."""
    (line,) = re.findall(r"farspan attention on cpu: (\{.*\})$", log, flags=re.MULTILINE)
    decisions = json.loads(line)
    prefill, offload = decisions.pop("prefill"), decisions.pop("offload")
    assert decisions == {
        "preset": "fast", "method": "flex", "kernel": "cpu", "page_size": 128,
        "string": None, "star": None,
    }  # fmt: skip
    assert prefill.items() >= {"selection": "tile_rows", "gamma": 1.0, "crossover": "by hand"}.items()
    assert offload.items() >= {"blocks": 128, "hot_heads": [0, 0]}.items()


def wait_until_up(client: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    import openai

    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start in {START_LIMIT_S} s: {log.read_text()[-4000:]}")


def test_completions(make_llm: Any, server: Any) -> None:
    import openai

    expected = generate(make_llm("llama", None, enable_prefix_caching=False), PROMPTS, 12)
    ask = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        words = [f"t{token}" for token in tokens]
        assert server.completions.create(prompt=prompt, **ask).choices[0].text.split() == words
        parts = [chunk.choices[0].text for chunk in server.completions.create(prompt=prompt, stream=True, **ask)]
        assert len(parts) > 1
        assert "".join(parts).split() == words
    refused: list[tuple[dict[str, Any], str]] = [
        ({"vllm_xargs": {"farspan.gamma": 2}}, r"farspan\.gamma=2"),
        ({"vllm_xargs": {"farspan_gamma": 0.9}}, r"farspan_gamma=0\.9"),
        ({"vllm_xargs": {"farspan.gamma": 0.9}, "use_beam_search": True, "n": 2}, "beam search"),
        ({"farspan.gamma": 0.9}, "under vllm_xargs"),
        ({"farspan": {"gamma": 0.9}}, "under vllm_xargs"),
    ]
    for body, sentence in refused:
        with pytest.raises(openai.BadRequestError, match=sentence):
            server.completions.create(prompt=PROMPTS[0], **{**ask, "extra_body": body})
    good = {**ask, "extra_body": {"ignore_eos": True, "vllm_xargs": {"farspan.method": "dense"}}}
    answer = server.completions.create(prompt=PROMPTS[0], **good)
    assert answer.choices[0].text.split() == [f"t{token}" for token in expected[0]]
    told = answer.model_dump()["kv_transfer_params"]
    assert told == {"farspan": {"prefill_tokens": {"request": len(PROMPTS[0])}}}
    read_density(server)
    read_metrics(server)


def read_metrics(server: Any) -> None:
    """The prompts' tokens in /metrics, and everything that the dashboard shows, all of ours included."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    scrape = httpx.get(str(server.base_url.join("/metrics"))).raise_for_status().text
    samples = [sample for family in text_string_to_metric_families(scrape) for sample in family.samples]
    tokens = {
        (sample.labels["path"], sample.labels["reason"]): sample.value
        for sample in samples
        if sample.name == "vllm:farspan_prefill_tokens_total"
    }
    # Once more each, as a stream, of which the prefix cache had what its pages hold.
    assert tokens["sparse", "selected"] >= sum(map(len, PROMPTS))
    assert tokens["dense", "request"] == len(PROMPTS[0])
    assert tokens["dense", "crossover"] == 0
    chosen = {
        sample.name.removeprefix("vllm:farspan_selection_"): sample.value
        for sample in samples
        if sample.name.startswith("vllm:farspan_selection_")
    }
    assert chosen["blocks_total"] >= chosen["causal_blocks_total"] > 0
    assert chosen["kept_total"] == pytest.approx(chosen["kept_of_total"])
    assert chosen["least_kept"] == pytest.approx(1)
    assert min(chosen["kept_of_total"], chosen["chunks_total"], chosen["seconds_total"]) > 0
    names = {sample.name for sample in samples}
    shown = set(re.findall(r"vllm:\w+", DASHBOARD.read_text()))
    assert shown <= names, sorted(shown - names)
    assert {name for name in names if "farspan" in name and not name.endswith("_created")} <= shown
    assert all(panel["description"] for panel in json.loads(DASHBOARD.read_text())["panels"])


def read_density(server: Any) -> None:
    """Of the prompts sent so far, as docs/deploying.md reads it."""
    import httpx

    def rows(**arguments: Any) -> list[dict[str, Any]]:
        call = {"method": "farspan_selection", "kwargs": arguments}
        (rank,) = (
            httpx.post(str(server.base_url.join("/collective_rpc")), json=call).raise_for_status().json()["results"]
        )
        return rank

    found = rows(reset=True)
    assert [(row["rank"], row["layer"], row["head"]) for row in found] == [
        (0, layer, head) for layer in range(2) for head in range(4)
    ]
    assert all(row["density"] >= 1 and row["coverage"] == pytest.approx(1) for row in found)
    assert rows() == []
