"""Predicted times of hosts: what must hold whatever the numbers are, and what was measured."""

import itertools
import math
from dataclasses import replace

import pytest
from farspan.cli import main
from farspan.scheduler.rates import LINKS, MEASURED, Link
from farspan.star.scaling import Cluster, fitted_rates

from tests.scheduler.test_rates import SHAPE_8B

NO_TIME = Link(name="none", gbs=math.inf, latency_us=0)
N = 131072


def cluster(num_hosts: int, link: Link = NO_TIME) -> Cluster:
    return Cluster(SHAPE_8B, MEASURED, link, num_hosts)


def test_two_blocks_on_two_hosts_gain_nothing_but_with_a_shared_anchor() -> None:
    two = cluster(2)
    assert two.star(N, N // 2, is_shared=False).prefill_s == pytest.approx(two.exact_s(N))
    shared = two.star(N, N // 2, is_shared=True).prefill_s
    # What is left is the second half, which sees all before it.
    assert shared == pytest.approx(two.exact_s(N) - two.exact_s(N // 2) * (1 - 1 / SHAPE_8B.num_layers))


@pytest.mark.parametrize("num_hosts", [2, 3, 8, 64])
def test_over_a_link_that_takes_no_time_exact_ways_divide_the_work(num_hosts: int) -> None:
    hosts = cluster(num_hosts)
    for way in (hosts.ring(N), hosts.visible_all(N), hosts.tensor_parallel(N)):
        assert way.prefill_s == pytest.approx(hosts.exact_s(N) / num_hosts)


@pytest.mark.parametrize("num_hosts", [2, 4, 16, 64])
def test_slower_links_are_never_faster_and_a_recomputed_anchor_needs_none(num_hosts: int) -> None:
    by_link = [cluster(num_hosts, LINKS[name]) for name in ("nvlink", "400Gb", "25Gb")]
    for fast, slow in itertools.pairwise(by_link):
        assert fast.ring(N).prefill_s <= slow.ring(N).prefill_s
        assert fast.visible_all(N).prefill_s < slow.visible_all(N).prefill_s
        assert fast.tensor_parallel(N).prefill_s < slow.tensor_parallel(N).prefill_s
        assert fast.star(N, None, is_shared=True).prefill_s <= slow.star(N, None, is_shared=True).prefill_s
        assert fast.star(N, None, is_shared=False).prefill_s == slow.star(N, None, is_shared=False).prefill_s
        assert fast.star(N, None, is_shared=False).token_s < slow.star(N, None, is_shared=False).token_s


def test_smaller_blocks_are_faster() -> None:
    for is_shared in (False, True):
        times = [cluster(2).star(N, N // share, is_shared=is_shared).prefill_s for share in (2, 4, 8, 16)]
        assert times == sorted(times, reverse=True)


def test_a_fit_finds_the_rates_behind_the_times() -> None:
    true = replace(MEASURED, linear_tflops=500.0, attention_tflops=400.0)
    one = Cluster(SHAPE_8B, true, NO_TIME, 1)
    found = fitted_rates(SHAPE_8B, MEASURED, {n: one.exact_s(n) for n in (65536, 131072, 262144)})
    assert found.linear_tflops == pytest.approx(500)
    assert found.attention_tflops == pytest.approx(400)
    assert found.kv_gbs == MEASURED.kv_gbs
    with pytest.raises(ValueError, match="1 measured lengths; a fit needs two or more"):
        fitted_rates(SHAPE_8B, MEASURED, {65536: 1.0})
    with pytest.raises(ValueError, match="do not grow"):
        fitted_rates(SHAPE_8B, MEASURED, {65536: 1.0, 131072: 1.1, 262144: 1.2})


def test_one_gpu_takes_as_long_as_measured() -> None:
    # benchmarks/data/ttft.csv, run 20261122-e2c7e0.
    assert cluster(1).exact_s(N) == pytest.approx(10.5, rel=0.02)


def test_the_command_prints_a_line_a_number_of_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["star", "plan", "--length", "131072", "--link", "25Gb", "--block-len", "8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "blocks of 8,192 tokens" in lines[0]
    assert [line.split()[0] for line in lines[4:11]] == ["1", "2", "4", "8", "16", "32", "64"]
    assert all(len(line.split()) == 7 for line in lines[5:11])
    for arguments, sentence in (
        (["--length", "100"], "--length 100; allowed: at least 256 tokens"),
        (["--length", "4096", "--block-len", "1000"], "block_len=1000; allowed: a multiple of the page size"),
        (["--model", "nowhere", "--length", "4096"], "nowhere"),
    ):
        assert main(["star", "plan", *arguments]) == 2
        assert sentence in capsys.readouterr().err
