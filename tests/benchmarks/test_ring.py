"""Ring attention over processes with gloo, and the plain Llama under it, against float64 and the whole mask."""

import time
from pathlib import Path

import pytest
import torch
from farspan.kernels import reference

from benchmarks.engine import TINY_LLAMA
from benchmarks.plain_llama import KVCache, Merged, PlainLlama, attend_behind, partial_attention
from benchmarks.ring import RingHosts, RingSpec, part_bounds, positions_of
from benchmarks.star_blocks import Anchor, Blocks, generate, read_context
from tests.integration.star_oracle import StarLlama
from tests.integration.tiny_models import write_model


def dense_attention(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The whole matrix at once."""
    mask = torch.ones(len(query), len(key), dtype=torch.bool).tril()
    return reference.attend(query, key, value, query.shape[-1] ** -0.5, mask)[0]


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 7])
@pytest.mark.parametrize("num_tokens", [14, 37, 1000])
def test_parts_hold_every_token_once(num_hosts: int, num_tokens: int) -> None:
    owned = [positions_of(rank, num_tokens, num_hosts) for rank in range(num_hosts)]
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(num_tokens))
    assert len(part_bounds(num_tokens, num_hosts)) == 2 * num_hosts + 1
    # Rows of the causal triangle: hosts differ by what a token more or less a part makes.
    pairs = [int((each + 1).sum()) for each in owned]
    assert max(pairs) - min(pairs) <= 2 * num_tokens


@pytest.mark.parametrize("num_hosts", [2, 3])
def test_the_ring_gives_the_same_hidden_states(num_hosts: int) -> None:
    device = torch.device("cpu")
    model = PlainLlama.random(TINY_LLAMA, torch.float32, device)
    exact = PlainLlama(model.config, {name: each.double() for name, each in model.weights.items()})
    with RingHosts(RingSpec(TINY_LLAMA, torch.float32), num_hosts, time.monotonic() + 120) as ring:
        ring.wait()
        for num_tokens in (37, 96):
            tokens = torch.randint(TINY_LLAMA["vocab_size"], (num_tokens,), generator=torch.Generator().manual_seed(1))
            answers = ring.prefill(tokens, 1, returns_hidden=True)
            expected = exact.forward(tokens, torch.arange(num_tokens), dense_attention)
            for answer in answers:
                hidden = torch.from_numpy(answer.hidden).double()
                torch.testing.assert_close(hidden, expected[answer.positions], atol=2e-5, rtol=2e-5)
                assert answer.prefill_ms[0] > 0
            head = TINY_LLAMA["num_key_value_heads"] * TINY_LLAMA["head_dim"]
            bytes_of_all = 2 * TINY_LLAMA["num_hidden_layers"] * num_tokens * head * 4
            # Every host receives what all others have.
            assert sum(answer.num_bytes for answer in answers) == (num_hosts - 1) * bytes_of_all


def test_partial_results_add_up_in_any_order() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(n, h, 64, generator=generator) for n, h in ((9, 4), (30, 2), (30, 2)))
    expected, lse = reference.attend(query, key, value, 0.125, torch.ones(9, 30, dtype=torch.bool))
    parts = [slice(0, 1), slice(1, 20), slice(20, 30)]
    for order in (parts, parts[::-1]):
        merged = Merged(query)
        for part in order:
            merged.add(*partial_attention(query, key[part], value[part], 0.125, causal=False))
        torch.testing.assert_close(merged.out, expected)
        torch.testing.assert_close(merged.lse, lse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama of the engine's tests."""
    return write_model(tmp_path_factory.mktemp("plain") / "llama", "llama")


@pytest.mark.parametrize(("share", "anchor"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.5), (4, 0.0)])
def test_blocks_give_the_oracles_tokens(folder: Path, share: int, anchor: float) -> None:
    context_len, block_len = 128, 128 // share
    prompt = torch.randint(512, (context_len + 9,), generator=torch.Generator().manual_seed(5))
    model = PlainLlama.from_folder(folder)
    blocks = Blocks(share, Anchor(size=anchor))
    cache = read_context(model, prompt[:context_len], blocks)
    expected = StarLlama(folder, context_len, block_len, int(block_len * anchor)).generate(prompt.tolist(), 8)
    assert generate(model, cache, context_len, prompt[context_len:], 8) == expected


def test_anchors_differ_as_they_say(folder: Path) -> None:
    model = PlainLlama.from_folder(folder)
    context = torch.randint(512, (96,), generator=torch.Generator().manual_seed(6))

    def last_keys(anchor: Anchor, share: int = 3) -> torch.Tensor:
        return read_context(model, context, Blocks(share, anchor)).layers[model.num_layers - 1][0]

    first = last_keys(Anchor())
    for anchor in (
        Anchor(content="none"),
        Anchor(content="constant"),
        Anchor(content="random"),
        Anchor(content="shuffled"),
        Anchor(positions="random"),
        Anchor(positions="previous"),
        Anchor(content="previous", positions="previous"),
    ):
        keys = last_keys(anchor)
        assert keys.isfinite().all()
        # Block 0 has no anchor; of two blocks the previous one is the first.
        assert torch.equal(keys[:32], first[:32])
        assert (keys[64:] - first[64:]).abs().max() > 1e-4
    two = last_keys(Anchor(), share=2)
    torch.testing.assert_close(last_keys(Anchor("previous", "previous"), share=2), two)
    own = KVCache()
    model.forward(context, torch.arange(96), attend_behind(model, [], own))
    torch.testing.assert_close(two, own.layers[model.num_layers - 1][0])
