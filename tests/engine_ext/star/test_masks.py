"""The passes of both phases against attention over a whole matrix of true positions, in float64."""

from typing import Any

import pytest
import torch
from farspan.engine_ext import impl
from farspan.engine_ext.errors import StarError
from farspan.engine_ext.passes import Sparse
from farspan.engine_ext.star.windows import WindowShard

from tests.engine_ext.star.hosts import (
    Host,
    Layout,
    at_places,
    first_of,
    make_tokens,
    meet_in_threads,
    oracle,
    run_hosts,
    shard_tokens,
    star_mask,
)

PAGE = 16
QUERY_LEN, NUM_DECODED = 21, 3
LAYOUTS = {
    "one-host-one-block": Layout(1, 96, 96, 96, (1,)),
    "one-host-blocks": Layout(1, 112, 32, 32, (4,)),
    "two-hosts": Layout(2, 128, 32, 32, (2, 2)),
    "two-hosts-small-anchor": Layout(2, 128, 32, 16, (2, 2)),
    "two-hosts-no-anchor": Layout(2, 128, 32, 0, (3, 1)),
    "three-hosts-ragged": Layout(3, 176, 32, 32, (3, 2, 1)),
    "four-hosts-ragged-small-anchor": Layout(4, 240, 48, 32, (2, 1, 1, 1)),
    "seven-hosts": Layout(7, 224, 32, 32, (1, 1, 1, 1, 1, 1, 1)),
    "a-host-without-blocks": Layout(3, 64, 32, 32, (1, 1, 0)),
}
LAST = "a-host-without-blocks"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("chunk", [7, 50, 1000], ids=lambda chunk: f"chunk{chunk}")
def test_both_phases_are_those_of_the_oracle(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_both_phases(LAYOUTS[name], chunk, monkeypatch)


@pytest.mark.parametrize("hot_heads", [0, 1], ids=lambda heads: f"hot{heads}")
@pytest.mark.parametrize("name", ["one-host-blocks", "two-hosts-small-anchor", "three-hosts-ragged", LAST])
def test_cold_heads_change_nothing(name: str, hot_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fewest slots for steps of 30 tokens: pieces are staged in both phases, and decode reads host memory."""
    hosts = check_both_phases(LAYOUTS[name], 30, monkeypatch, hot_heads=hot_heads, num_slots=4)
    longest = max(hosts, key=lambda host: len(host.tables[0]))
    assert longest.cold is not None
    assert min(longest.cold.num_spilled, longest.cold.num_staged) > 0


@pytest.mark.parametrize("hot_heads", [0, 1, 2], ids=lambda heads: f"hot{heads}")
def test_keys_are_turned_once(hot_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hot heads before vLLM's pages are written, cold ones before slots are: queries have four heads, keys two."""
    num_heads: list[int] = []
    turn = impl.at_true_positions

    def count(heads: torch.Tensor, moved: Any, turns: Any) -> torch.Tensor:
        num_heads.append(heads.shape[1])
        return turn(heads, moved, turns)

    monkeypatch.setattr(impl, "at_true_positions", count)
    cold = {} if hot_heads == 2 else {"hot_heads": hot_heads, "num_slots": 8}
    check_both_phases(LAYOUTS["one-host-blocks"], 1000, monkeypatch, **cold)
    num_steps = num_heads.count(4)
    assert num_steps > 2
    assert sum(num_heads) == num_steps * (4 + 2)


def check_both_phases(layout: Layout, chunk: int, monkeypatch: pytest.MonkeyPatch, **cold: int) -> list[Host]:
    """Returns the hosts. cold: `Host`'s."""
    tokens = make_tokens(layout.context_len + QUERY_LEN + NUM_DECODED)
    expected = oracle(tokens, star_mask(layout, len(tokens.query))).float()
    shards = layout.shards()
    hosts = [Host(PAGE, 64, None, monkeypatch, **cold) for _ in shards]
    meet_in_threads(layout.num_hosts, monkeypatch)

    for shard, host in zip(shards, hosts, strict=True):
        own = shard_tokens(tokens, shard)
        outs, done = [torch.empty(0, 4, 64)], 0
        while done < shard.local_len:
            end = min(done + chunk, shard.local_len)
            outs += host.step([(0, shard, first_of(own, end), done)])
            done = end
        out = torch.cat(outs)
        torch.testing.assert_close(out[: shard.copied_len], expected[: shard.copied_len], atol=2e-5, rtol=1e-4)
        own_rows = slice(shard.own_start, shard.own_start + shard.own_len)
        torch.testing.assert_close(out[shard.copied_len :], expected[own_rows], atol=2e-5, rtol=1e-4)

    def answer(rank: int) -> torch.Tensor:
        shard, host = shards[rank], hosts[rank]
        own = shard_tokens(tokens, shard)
        outs, done = [], 0
        for length in [chunk] * (QUERY_LEN // chunk) + [QUERY_LEN % chunk] + [1] * NUM_DECODED:
            if length:
                end = shard.local_len + done + length
                outs += host.step([(0, shard, first_of(own, end), shard.local_len + done)])
                done += length
        return torch.cat(outs)

    answers = run_hosts(layout.num_hosts, answer)
    for out in answers:
        torch.testing.assert_close(out, expected[layout.context_len :], atol=2e-5, rtol=1e-4)
        # float32 rotations differ by host, by what they turn; the combination must not.
        torch.testing.assert_close(out, answers[0], atol=0, rtol=0)
    for host in hosts:
        if host.cold is not None and host.residency is not None:
            host.cold.check_integrity()
            host.residency.check_integrity()
    return hosts


@pytest.mark.parametrize("cold", [{}, {"hot_heads": 1, "num_slots": 40}], ids=["", "cold"])
def test_a_step_with_all_kinds_of_requests(cold: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary decodes and chunks between Star requests in either phase, on two hosts."""
    layout = LAYOUTS["two-hosts"]
    shards = layout.shards()
    tokens = [make_tokens(layout.context_len + 30, seed) for seed in range(4)]
    full = star_mask(layout, layout.context_len + 30)
    expected = [oracle(each, full).float() for each in tokens[:2]]
    causal = torch.ones(len(full), len(full), dtype=torch.bool).tril()
    expected += [oracle(each, causal).float() for each in tokens[2:]]
    hosts = [Host(PAGE, 128, None, monkeypatch, **cold) for _ in shards]
    meet_in_threads(2, monkeypatch)

    def work(rank: int) -> list[torch.Tensor]:
        shard, host = shards[rank], hosts[rank]
        owned = [shard_tokens(each, shard) for each in tokens[:2]]
        context = shard.local_len
        host.step([(0, shard, first_of(owned[0], context), 0), (2, None, first_of(tokens[2], 40), 0)])
        host.step([(1, shard, first_of(owned[1], 10), 0)])
        # A token of an ordinary request and one of a query; a chunk of each; the rest of a shard's context.
        one = host.step([(2, None, first_of(tokens[2], 41), 40), (0, shard, first_of(owned[0], context + 1), context)])
        return one + host.step(
            [
                (2, None, first_of(tokens[2], 42), 41),
                (0, shard, first_of(owned[0], context + 9), context + 1),
                (3, None, first_of(tokens[3], 25), 0),
                (1, shard, first_of(owned[1], context + 5), 10),
            ]
        )

    for rank, out in enumerate(run_hosts(2, work)):
        query = layout.context_len
        torch.testing.assert_close(out[0], expected[2][40:41], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out[1], expected[0][query : query + 1], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out[2], expected[2][41:42], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out[3], expected[0][query + 1 : query + 9], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out[4], expected[3][:25], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out[5][-5:], expected[1][query : query + 5], atol=2e-5, rtol=1e-4)
        assert len(out[5]) == shards[rank].local_len - 10 + 5


@pytest.mark.parametrize("method", ["flex", "block_sparse"])
def test_sparse_inside_blocks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At gamma 1 every block of anchor and own block is read, so that the result is the dense one; a window lies over
    a host's own tokens, and its sink is the start of the anchor.
    """
    layout = Layout(2, 1024, 512, 256, (1, 1))
    tokens = make_tokens(layout.context_len)
    mask = star_mask(layout, layout.context_len)
    prefill = {"method": "flex", "gamma": 1.0, "min_seq_len": 0, "min_chunk_len": 0, "coverage_rows": 0}
    if method == "block_sparse":
        prefill = {"method": "block_sparse", "block_size": 64, "sink_blocks": 1, "local_blocks": 2}
        # The host's tokens: the anchor, then its block from 512 on, whose first one has 256 before it.
        local = torch.cat([torch.arange(256), torch.arange(512, 1024)])
        block = torch.arange(len(local)) // 64
        seen = (block[:, None] - block < 2) | (block == 0)
        mask[local[:, None], local] &= seen
    expected = oracle(tokens, mask).float()
    shard = layout.shards()[1]
    host = Host(PAGE, 64, {"prefill": prefill}, monkeypatch)
    made: list[Any] = []
    stock = host.builder.build
    monkeypatch.setattr(host.builder, "build", lambda *arguments: made.append(stock(*arguments)) or made[-1])
    own = shard_tokens(tokens, shard)
    outs = host.step([(0, shard, first_of(own, 256), 0)]) + host.step([(0, shard, own, 256)])
    assert all(isinstance(each.work, Sparse) for step in made for each in step.passes)
    torch.testing.assert_close(torch.cat(outs)[256:], expected[512:], atol=2e-5, rtol=1e-4)


def test_decode_from_buffers_that_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured graph reads: two requests and padding, over a page's end, on hosts with and without keys."""
    layout = LAYOUTS["a-host-without-blocks"]
    first, other = layout.shards("a"), Layout(3, 96, 32, 16, (1, 1, 1)).shards("b")
    tokens = [make_tokens(layout.context_len + 30, 1), make_tokens(96 + 30, 2)]
    expected = [
        oracle(tokens[0], star_mask(layout, len(tokens[0].query))).float()[64:],
        oracle(tokens[1], star_mask(Layout(3, 96, 32, 16, ()), len(tokens[1].query))).float()[96:],
    ]
    meet_in_threads(3, monkeypatch)
    hosts = [Host(PAGE, 64, None, monkeypatch, graphs=True) for _ in first]
    for host in hosts:
        # What vLLM warms up with: no request of ours.
        assert host.builder.lockstep is not None

    def work(rank: int) -> tuple[list[torch.Tensor], set[int]]:
        host, shards = hosts[rank], (first[rank], other[rank])
        owned = [shard_tokens(each, shard) for each, shard in zip(tokens, shards, strict=False)]
        for request, (own, shard) in enumerate(zip(owned, shards, strict=True)):
            context = shard.local_len
            if context:
                host.step([(request, shard, first_of(own, context), 0)])
            host.step([(request, shard, first_of(own, context + 2), context)])
        outs, places = [], set()
        stock = host.builder.build

        def build(*arguments: Any) -> Any:
            made = stock(*arguments)
            (each,) = made.passes
            batch = each.batch
            places.add((batch.block_table.data_ptr(), batch.kv_lens.data_ptr(), batch.max_kv_len))
            return made

        host.builder.build = build
        for step in range(2, 20):
            chunks: list[Any] = [
                (request, shard, first_of(own, shard.local_len + step + 1), shard.local_len + step)
                for request, (own, shard) in enumerate(zip(owned, shards, strict=True))
            ]
            outs.append(torch.cat(host.step(chunks, padding=2)))
        return outs, places

    for outs, places in run_hosts(3, work):
        assert len(places) == 1
        for step, out in enumerate(outs, start=2):
            torch.testing.assert_close(out[0], expected[0][step], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(out[1], expected[1][step], atol=2e-5, rtol=1e-4)


def test_buffers_are_filled_anew_after_a_step_with_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was preempted comes back with other pages, under the same name and in the same row."""
    layout = LAYOUTS["two-hosts"]
    tokens = make_tokens(layout.context_len + 10)
    expected = oracle(tokens, star_mask(layout, len(tokens.query))).float()[layout.context_len :]
    meet_in_threads(2, monkeypatch)
    hosts = [Host(PAGE, 64, None, monkeypatch, graphs=True) for _ in range(2)]

    def work(rank: int) -> list[torch.Tensor]:
        host, shard = hosts[rank], layout.shards()[rank]
        own, context = shard_tokens(tokens, shard), shard.local_len
        outs = []
        for first in (2, 5):
            host.tables.clear()
            host.step([(0, shard, first_of(own, context), 0)])
            host.step([(0, shard, first_of(own, context + first), context)])
            # No page's end in between.
            outs += [
                host.step([(0, shard, first_of(own, context + at + 1), context + at)])[0] for at in (first, first + 1)
            ]
        return outs

    for outs in run_hosts(2, work):
        for out, at in zip(outs, (2, 3, 5, 6), strict=True):
            torch.testing.assert_close(out[0], expected[at], atol=2e-5, rtol=1e-4)


def test_a_host_that_decodes_in_graphs_refuses_steps_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["two-hosts"]
    meet_in_threads(2, monkeypatch)
    host = Host(PAGE, 64, None, monkeypatch, graphs=True)
    own = shard_tokens(make_tokens(layout.context_len + 5), layout.shards()[0])
    with pytest.raises(StarError, match="a step of one token that other hosts do not take part in"):
        host.step([(0, layout.shards()[0], first_of(own, 1), 0)])


def window_shards(num_hosts: int, num_pages: int, window_pages: int) -> list[WindowShard]:
    common = {"name": "w", "context": "c", "context_len": num_pages * PAGE, "window_len": window_pages * PAGE}
    return [
        WindowShard(**common, page_size=PAGE, num_hosts=num_hosts, query_host=num_hosts - 1, rank=rank)
        for rank in range(num_hosts)
    ]


@pytest.mark.parametrize(
    ("num_hosts", "num_pages", "window_pages"),
    [(2, 8, 8), (2, 13, 8), (2, 12, 4), (3, 19, 12), (4, 8, 16), (7, 15, 28)],
    ids=str,
)
def test_every_token_sees_all_before_it(
    num_hosts: int, num_pages: int, window_pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = window_shards(num_hosts, num_pages, window_pages)
    context_len, chunk = num_pages * PAGE, window_pages * PAGE // num_hosts
    tokens = make_tokens(context_len + QUERY_LEN)
    causal = torch.ones(len(tokens.query), len(tokens.query), dtype=torch.bool).tril()
    expected = oracle(tokens, causal).float()
    meet_in_threads(num_hosts, monkeypatch)
    hosts = [Host(PAGE, 64, None, monkeypatch) for _ in shards]

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard, host = shards[rank], hosts[rank]
        shard.check(PAGE, shard.local_len)
        places = torch.tensor([at for start, stop in shard.stretches() for at in range(start, stop)])
        own = at_places(tokens, torch.cat([places, torch.arange(context_len, len(tokens.query))]))
        outs = []
        for first in range(0, shard.local_len, chunk):
            outs += host.step([(0, shard, first_of(own, min(first + chunk, shard.local_len)), first)])
        # Found in the prefix cache but for the last page, as a second question's phase 1 does.
        last = shard.local_len - PAGE
        (again,) = host.step([(0, shard, first_of(own, shard.local_len), last)])
        torch.testing.assert_close(again, torch.cat(outs)[last:], atol=2e-5, rtol=1e-4)
        for first, end in ((0, 20), (20, QUERY_LEN)):
            outs += host.step([(0, shard, first_of(own, shard.local_len + end), shard.local_len + first)])
        return places, torch.cat(outs)

    results = run_hosts(num_hosts, work)
    assert sorted(torch.cat([places for places, _ in results]).tolist()) == list(range(context_len))
    for places, out in results:
        torch.testing.assert_close(out[: len(places)], expected[places], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(out[len(places) :], expected[context_len:], atol=2e-5, rtol=1e-4)


def test_flex_reads_only_its_blocks_of_all_hosts_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists of a chunk are those of the same chunk on one host: here at gamma 1, all blocks of the context."""
    shards = window_shards(2, 64, 32)
    tokens = make_tokens(1024)
    expected = oracle(tokens, torch.ones(1024, 1024, dtype=torch.bool).tril()).float()
    prefill = {"method": "flex", "gamma": 1.0, "min_seq_len": 0, "min_chunk_len": 0, "coverage_rows": 0}
    meet_in_threads(2, monkeypatch)
    hosts = [Host(PAGE, 64, {"prefill": prefill}, monkeypatch) for _ in shards]

    def work(rank: int) -> None:
        shard, host = shards[rank], hosts[rank]
        made: list[Any] = []
        stock = host.builder.build
        host.builder.build = lambda *arguments: made.append(stock(*arguments)) or made[-1]
        places = torch.tensor([at for start, stop in shard.stretches() for at in range(start, stop)])
        own = at_places(tokens, places)
        for first in (0, 256):
            (out,) = host.step([(0, shard, first_of(own, first + 256), first)])
            torch.testing.assert_close(out, expected[places[first : first + 256]], atol=2e-5, rtol=1e-4)
        assert all(isinstance(each.work, Sparse) for step in made for each in step.passes)

    run_hosts(2, work)


def test_chunks_that_leave_the_windows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with shorter chunks than its windows would see pages that nobody has computed."""
    shards = window_shards(2, 16, 8)
    tokens = make_tokens(256)
    meet_in_threads(2, monkeypatch)
    hosts = [Host(PAGE, 64, None, monkeypatch) for _ in shards]

    def work(rank: int) -> str:
        shard = shards[rank]
        own = at_places(tokens, torch.tensor([at for start, stop in shard.stretches() for at in range(start, stop)]))
        with pytest.raises(StarError) as caught:
            hosts[rank].step([(0, shard, first_of(own, 48), 0)])
        return str(caught.value)

    for sentence in run_hosts(2, work):
        assert "before other hosts have what they see" in sentence


@pytest.mark.parametrize("chunk", [16, 48, 1000], ids=lambda chunk: f"chunk{chunk}")
def test_an_anchor_that_is_sent_is_the_computed_one_bit_for_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["three-hosts-ragged"]
    tokens = make_tokens(layout.context_len)
    made = meet_in_threads(layout.num_hosts, monkeypatch)
    shards = layout.shards()

    def work(rank: int, host: Host, shares: bool) -> torch.Tensor:
        shard = shards[rank]
        own = shard_tokens(tokens, shard)
        made[rank].anchor_of = shard.name if shares else None
        done, outs = 0, []
        while done < shard.local_len:
            end = min(done + chunk, shard.local_len)
            if done < shard.copied_len:
                end = min(end, shard.copied_len)
                if shares:
                    done = shard.copied_len
                    continue
            outs += host.step([(0, shard, first_of(own, end), done)])
            done = end
        assert made[rank].anchor_of is None
        return torch.cat(outs)[-shard.own_len :]

    both = []
    for shares in (True, False):
        hosts = [Host(PAGE, 64, None, monkeypatch) for _ in shards]
        for shard, host in zip(shards, hosts, strict=True):
            # As the engine's prefix cache does, which holds a place for the anchor before it comes.
            host.tables[0] = [host.free.pop() for _ in range(shard.local_len // PAGE)]
        both.append(
            run_hosts(layout.num_hosts, lambda rank, hosts=hosts, shares=shares: work(rank, hosts[rank], shares))
        )
    for shared, computed in zip(*both, strict=True):
        torch.testing.assert_close(shared, computed, atol=0, rtol=0)
