"""How long hosts will take together, from what one GPU and one link were measured to do: no engine, no GPU.

Star Attention with the anchor recomputed or shared, blocks that see all earlier ones, a zigzag ring and tensor
parallelism, for one prompt alone. What is left out: the host's own time, and hosts that are slower than others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from farspan.scheduler.footprint import ModelShape
from farspan.scheduler.rates import Link, Rates
from farspan.star.blocks import BlockSizes, assign_blocks, block_lens, default_block_len

ELEMENT_BYTES = 2
LSE_BYTES = 4


@dataclass(frozen=True)
class Times:
    """Of one prompt, in seconds."""

    prefill_s: float
    """Until the context is read; with Star, phase 1."""
    token_s: float
    """Each new token."""


@dataclass(frozen=True)
class Cluster:
    """Hosts with a GPU each, all alike."""

    shape: ModelShape
    rates: Rates
    link: Link
    num_hosts: int

    def linear_s(self, num_tokens: float) -> float:
        """Linear layers of all layers, on one host."""
        return 2 * self.shape.active_params * num_tokens / (self.rates.linear_tflops * 1e12)

    def attention_s(self, pairs: float) -> float:
        """Attention of all layers and heads over so many pairs of a query and a key, on one host."""
        return 4 * self.shape.num_heads * self.shape.head_dim * self.shape.num_layers * pairs / self.attention_flops

    @property
    def attention_flops(self) -> float:
        return self.rates.attention_tflops * 1e12

    @property
    def linear_pairs(self) -> float:
        """Pairs whose attention costs as much as the linear layers of a token."""
        return self.linear_s(1) / self.attention_s(1)

    def kv_bytes(self, num_tokens: float) -> float:
        """Keys and values in all layers."""
        return 2 * ELEMENT_BYTES * self.shape.num_layers * self.shape.num_kv_heads * self.shape.head_dim * num_tokens

    def transfer_s(self, num_bytes: float, steps: int = 1) -> float:
        """Bytes that a host receives, in so many collectives of all hosts."""
        return num_bytes / (self.link.gbs * 1e9) + steps * self.latency_s

    @property
    def latency_s(self) -> float:
        return self.link.latency_us * 1e-6 * max(math.ceil(math.log2(self.num_hosts)), 0)

    def exact_s(self, num_tokens: int) -> float:
        """One GPU alone."""
        return self.linear_s(num_tokens) + self.attention_s(num_tokens**2 / 2)

    def star(self, num_tokens: int, block_len: int | None, *, is_shared: bool, page_size: int = 128) -> Times:
        """Blocks behind an anchor as long as a block; shared over the link, or recomputed on every host but the first.

        A shared anchor is assumed to be sent layer by layer beside its computation, so that the others wait for one
        layer of it and for what the link takes longer.
        """
        block_len = block_len or default_block_len(num_tokens, self.num_hosts, page_size)
        BlockSizes(block_len, None).check(page_size)
        lens = block_lens(num_tokens, block_len)
        anchor_len = min(block_len, num_tokens)
        counts = assign_blocks(lens, self.num_hosts, anchor_len, self.linear_pairs, waited_len=0 if is_shared else None)
        anchor_s = self.exact_s(anchor_len)
        received_s = self.transfer_s(self.kv_bytes(anchor_len), self.shape.num_layers)
        first, slowest = 0, 0.0
        for rank, count in enumerate(counts):
            seconds = 0.0
            for at in range(first, first + count):
                pairs = lens[at] ** 2 / 2 + (lens[at] * anchor_len if at else 0)
                seconds += self.linear_s(lens[at]) + self.attention_s(pairs)
            if rank and count:
                layer_s = anchor_s / self.shape.num_layers
                seconds = max(seconds + layer_s, received_s) if is_shared else seconds + anchor_s
            first += count
            slowest = max(slowest, seconds)
        return Times(slowest, self.token_s(num_tokens))

    def visible_all(self, num_tokens: int) -> Times:
        """Exact attention, each layer's keys and values gathered from all hosts before it is computed."""
        received = self.kv_bytes(num_tokens) * (self.num_hosts - 1) / self.num_hosts
        seconds = self.exact_s(num_tokens) / self.num_hosts + self.transfer_s(received, self.shape.num_layers)
        return Times(seconds, self.token_s(num_tokens))

    def ring(self, num_tokens: int) -> Times:
        """Exact attention in a zigzag ring, whose every step hides behind its attention where the link is fast."""
        hosts, layers = self.num_hosts, self.shape.num_layers
        step_s = self.attention_s(num_tokens**2 / 2) / hosts**2 / layers
        send_s = self.kv_bytes(num_tokens) / hosts / layers / (self.link.gbs * 1e9) + self.link.latency_us * 1e-6
        steps_s = step_s + (hosts - 1) * max(step_s, send_s)
        return Times(self.linear_s(num_tokens) / hosts + layers * steps_s, self.token_s(num_tokens))

    def tensor_parallel(self, num_tokens: int) -> Times:
        """Heads over the hosts, two all-reduces a layer; KV heads are held twice where there are more hosts."""
        hosts, layers = self.num_hosts, self.shape.num_layers
        share = 2 * (hosts - 1) / hosts

        def reduce_s(tokens: int) -> float:
            return (
                2
                * layers
                * (share * tokens * self.shape.hidden_size * ELEMENT_BYTES / (self.link.gbs * 1e9) + self.latency_s)
            )

        heads = min(hosts, self.shape.num_kv_heads)
        weights_s = self.weights_s / hosts
        token_s = weights_s + self.kv_bytes(num_tokens) / heads / (self.rates.kv_gbs * 1e9) + reduce_s(1)
        return Times(self.exact_s(num_tokens) / hosts + reduce_s(num_tokens), token_s)

    @property
    def weights_s(self) -> float:
        """Reading all weights once."""
        params = self.shape.active_params + self.shape.head_params
        return params * ELEMENT_BYTES / (self.rates.weight_gbs * 1e9)

    def token_s(self, num_tokens: int) -> float:
        """A token of phase 2: all weights and a share of the KV on every host, and an exchange a layer."""
        heads = self.shape.num_heads
        sent = heads * (self.shape.head_dim * ELEMENT_BYTES + LSE_BYTES) * (self.num_hosts - 1)
        exchange_s = self.shape.num_layers * self.transfer_s(sent) if self.num_hosts > 1 else 0.0
        return self.weights_s + self.kv_bytes(num_tokens) / self.num_hosts / (self.rates.kv_gbs * 1e9) + exchange_s


def fitted_rates(shape: ModelShape, rates: Rates, measured_s: Mapping[int, float]) -> Rates:
    """Rates whose linear layers and attention take the measured times of exact prefills on one GPU.

    measured_s: seconds by tokens, of two lengths or more. Least squares of the relative errors, for a time that grows
    by the tokens and by their square. Raises ValueError where the times do not look like that.
    """
    if len(measured_s) < 2:
        raise ValueError(f"{len(measured_s)} measured lengths; a fit needs two or more")
    # seconds = linear * n + square * n**2, both sides divided by the seconds.
    rows = [(n / s, n * n / s) for n, s in measured_s.items()]
    aa, ab, bb = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(x[i] for x in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    linear, square = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if linear <= 0 or square <= 0:
        raise ValueError(f"times {dict(measured_s)} do not grow by the tokens and by their square")
    linear_flops = 2 * shape.active_params / linear
    attention_flops = 2 * shape.num_heads * shape.head_dim * shape.num_layers / square
    return replace(rates, linear_tflops=linear_flops / 1e12, attention_tflops=attention_flops / 1e12)
