"""Rounds of the Hopper kernel on a GPU: cases in a child process with a watchdog, since a wrong kernel hangs.

`python hopper_round.py` runs all; `--child GROUP --skip N` is the child. Removed before the branch is merged.
"""

import argparse
import os
import select
import signal
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import replace

BUDGET_S = float(os.environ.get("BUDGET", "100"))
CASE_S = 25
START_S = 45


def say(*words):
    print(*words, flush=True)


def launches_of():
    from farspan.kernels.hopper.prefill_kernel import hopper_prefill_kernel as kernel

    seen, run = {}, kernel.run

    def wrapped(*args, **kwargs):
        made = run(*args, **kwargs)
        if id(made) not in seen:
            seen[id(made)] = made
            try:
                say("   compiled: registers", made.n_regs, "spills", made.n_spills, "shared", made.metadata.shared)
            except Exception as problem:
                say("   no resources:", problem)
        return made

    kernel.run = wrapped


def correct_cases():
    import torch
    from farspan.kernels.rotary_turn import make_string_turn
    from tests.kernels.helpers import assert_attention_close, random_block_lists, reference_attention
    from farspan.kernels.tuning import HopperPrefillConfig
    from tests.kernels.test_hopper_prefill import PORTABLE, draw
    from tests.kernels.test_hopper_prefill import prefill as prefill_by

    best = HopperPrefillConfig(2, 2, overlap=2, pack=True, late=True)

    def prefill(batch, config=best, **options):
        return prefill_by(batch, config, **options)

    device, bf16 = torch.device("cuda"), torch.bfloat16

    def dense(query_lens, seq_lens, causal=True, **options):
        batch = draw(device, query_lens, seq_lens, **options)
        result = prefill(batch, causal=causal)
        torch.cuda.synchronize()
        expected = reference_attention(batch, causal=causal)
        say("   max error", float((result[0].float() - expected[0].float()).abs().max()), "lse", float((result[1] - expected[1]).abs().max()))
        assert_attention_close(*result, *expected, options.get("dtype", bf16))

    def lists(heads, causal, density=0.4):
        batch = draw(device, [1000, 129], [3000, 129])
        tiles = batch.tiles(128)
        made = random_block_lists(tiles, heads, density, seq_lens=None if causal else batch.seq_lens, force_first=False)
        expected = reference_attention(batch, causal=causal, tiles=tiles, block_lists=made)
        assert_attention_close(*prefill(batch, causal=causal, block_lists=made), *expected, bf16)

    def first_pos():
        batch = draw(device, [200, 65], [1200, 300])
        paged = replace(batch.paged, first_pos=torch.tensor([900, 235], dtype=torch.int32, device=device))
        expected = prefill(batch, PORTABLE, paged=paged, causal=False)
        assert_attention_close(*prefill(batch, paged=paged, causal=False), *expected, bf16)

    def turned(shift, density):
        batch = draw(device, [1000, 129], [3000, 129])
        tiles = batch.tiles(128)
        made = None if density is None else random_block_lists(tiles, 8, density)
        turn = make_string_turn(10_000.0 ** -(torch.arange(64) / 64), shift, 64, True, device)
        expected = prefill(batch, PORTABLE, block_lists=made, turn=turn)
        assert_attention_close(*prefill(batch, block_lists=made, turn=turn), *expected, bf16)

    def many_times():
        batch = draw(device, [4000], [9000], num_heads=32, num_kv_heads=8)
        first = prefill(batch)
        for _ in range(30):
            again = prefill(batch)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), "results move between runs"

    return [
        ("one tile", lambda: dense([128], [128])),
        ("three tiles", lambda: dense([384], [384])),
        ("ragged", lambda: dense([1000, 63, 1, 129], [1000, 1063, 500, 129])),
        ("again and again", many_times),
        ("lists per head", lambda: lists(8, True)),
        ("lists full", lambda: lists(8, False)),
        ("fp16", lambda: dense([1000, 63], [1000, 1063], dtype=torch.float16)),
        ("d64", lambda: dense([1000, 63], [1000, 1063], head_dim=64)),
        ("page 16", lambda: dense([1000, 63], [1000, 1063], page_size=16)),
        ("turn 300 dense", lambda: turned(300, None)),
        ("turn 300 lists", lambda: turned(300, 0.4)),
        ("first_pos", first_pos),
    ]


def time_cases():
    import torch
    from benchmarks import peers
    from benchmarks.calls import kv_of, paged_of, tiles_of
    from benchmarks.inputs import AttentionShape, make_paged_batch
    from benchmarks.timing import time_interleaved
    from farspan.kernels.prefill import prefill_attention
    from farspan.kernels.tuning import HopperPrefillConfig, prefill_config
    from farspan.kernels.tiles import BlockLists

    def lists_of(tiles, heads, density, device):
        diagonal = tiles.tile_block.cpu()
        count = int(diagonal.max()) + 1
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(heads, len(diagonal), count, generator=generator) < density
        kept &= torch.arange(count) < diagonal[:, None]
        kept[:, :, 0] = True
        kept[:, torch.arange(len(diagonal)), diagonal] = True
        order = torch.where(kept, torch.arange(count), count).sort(-1).values.int()
        return BlockLists(order.to(device).contiguous(), kept.sum(-1).int().to(device).contiguous())

    def timed(query_len, seq_len, density=None, list_heads=32, repeats=10, turn=None, shape=AttentionShape(), variants=None):
        batch = make_paged_batch([query_len], [seq_len], shape)
        tiles, paged = tiles_of(batch), paged_of(batch)
        keys, values = kv_of(batch).split()
        lists, flops = None, batch.causal_flops
        if density is not None:
            lists = lists_of(tiles, list_heads, density, batch.query.device)
            # Computed blocks, the diagonal ones whole.
            flops = 4.0 * 128 * 128 * shape.head_dim * float(lists.block_counts.double().sum()) * shape.num_q_heads / list_heads
        out, lse = torch.empty_like(batch.query), torch.empty(shape.num_q_heads, query_len, device="cuda")
        other, other_lse = torch.empty_like(out), torch.empty_like(lse)

        def call(config, out, lse):
            return lambda: prefill_attention(
                batch.query, keys, values, paged, tiles, shape.scale,
                block_lists=lists, turn=turn, out=out, lse=lse, config=config,
            )

        def ours(heads_in_a_row=8, num_stages=2, **options):
            return call(HopperPrefillConfig(heads_in_a_row, num_stages, **options), out, lse)

        portable = call(
            prefill_config(
                shape.head_dim, shape.dtype, (9, 0), block_size=128, tokens_per_tile=128,
                heads_that_share=4 if list_heads != 32 else 1, keys_in_a_row=128, has_turn=turn is not None,
                has_lists=lists is not None,
            ),
            other, other_lse,
        )
        works = {"hopper" + "".join(f" {name}={value}" for name, value in options.items()): ours(**options) for options in variants or [{}]}
        works["portable"] = portable
        if density is None and peers.has_module("vllm.vllm_flash_attn"):
            works["fa3"] = peers.fa3(batch)
        portable()
        for name in works:
            if name.startswith("hopper"):
                out.fill_(float("nan"))
                works[name]()
                torch.cuda.synchronize()
                error = float((out.float() - other.float()).abs().max() / other.float().abs().max())
                say(f"   {name} against portable: {error:.2e}, lse {float((lse - other_lse).abs().max()):.2e}")
        for name, samples in time_interleaved(works, repeats=repeats).items():
            ms = statistics.median(samples)
            say(f"   {name}: {ms:.3f} ms (least {min(samples):.3f}), {flops / ms / 1e9:.0f} TFLOP/s")

    d64 = AttentionShape(num_q_heads=32, num_kv_heads=8, head_dim=64)
    best = {"overlap": 2, "pack": True, "late": True}
    variants = [{}, best, {"overlap": 2}, best | {"take_turns": True}, {"take_turns": True}, best | {"q_regs": True}]
    four = {"num_stages": 4}
    narrow = [{}, four, best | four, best | four | {"exp_mix": 4}, best | four | {"exp_mix": 8}]
    narrow.append(best | four | {"take_turns": True})
    return [
        ("dense 32K", lambda: timed(32768, 32768, variants=variants)),
        ("dense 8K", lambda: timed(8192, 8192, repeats=30, variants=variants)),
        ("lists .3 per head 64K", lambda: timed(65536, 65536, 0.3, 32, 6, variants=[{}, best, best | {"take_turns": True}])),
        ("d64 32K", lambda: timed(32768, 32768, shape=d64, variants=narrow)),
        ("dense 2K", lambda: timed(2048, 2048, repeats=40, variants=variants)),
        ("dense 4K", lambda: timed(4096, 4096, repeats=40, variants=variants)),
        ("chunk 2K at 32K", lambda: timed(2048, 32768, repeats=20, variants=variants[:2])),
        ("dense 128K", lambda: timed(131072, 131072, repeats=4, variants=[{}, best])),
        ("lists .3 shared 64K", lambda: timed(65536, 65536, 0.3, 8, 6, variants=[{}, best])),
        ("lists .1 per head, chunk 16K at 128K", lambda: timed(16384, 131072, 0.1, 32, 8, variants=[{}, best])),
    ]


def child(group, skip):
    import torch

    torch.manual_seed(0)
    launches_of()
    cases = correct_cases() if group == "correct" else time_cases()
    for number, (name, case) in enumerate(cases):
        if number < skip:
            continue
        say(f"@{number} {group}: {name}")
        begun = time.time()
        try:
            case()
            torch.cuda.synchronize()
            say(f"   OK {time.time() - begun:.1f} s")
        except Exception as problem:
            say(f"   FAILED {type(problem).__name__}: {str(problem)[:400]}")
            if "assert" not in type(problem).__name__.lower():
                say("".join(traceback.format_exc().splitlines(keepends=True)[-8:]))
            if "CUDA" in str(problem) or "illegal" in str(problem):
                sys.exit(7)
    say("@done")


def parent():
    end = time.time() + BUDGET_S
    for group in ("correct", "time"):
        skip, kills = 0, 0
        while time.time() < end and kills < 3:
            run = subprocess.Popen(
                [sys.executable, "-u", __file__, "--child", group, "--skip", str(skip)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
            number, done, last, limit, rest = skip - 1, False, time.time(), START_S, b""
            while True:
                ready, _, _ = select.select([run.stdout], [], [], 1)
                if ready:
                    chunk = os.read(run.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    rest += chunk
                    *lines, rest = rest.split(b"\n")
                    for line in lines:
                        text = line.decode(errors="replace")
                        say(text)
                        if text.startswith("@done"):
                            done = True
                        elif text.startswith("@"):
                            number, limit = int(text[1:].split()[0]), CASE_S
                    last = time.time()
                elif time.time() - last > limit or time.time() > end:
                    say(f"!! killed in {group} case {number} after {time.time() - last:.0f} s of silence")
                    break
            try:
                os.killpg(run.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            try:
                run.wait(10)
            except subprocess.TimeoutExpired:
                say("!! the child does not end")
            if done:
                break
            kills += 1
            skip = max(number, skip) + 1
    say("all done")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    parser.add_argument("--skip", type=int, default=0)
    arguments = parser.parse_args()
    child(arguments.child, arguments.skip) if arguments.child else parent()
