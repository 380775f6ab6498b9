"""What a layer brings from other hosts before it attends: the anchor's KV once, or all keys of a window's steps."""

from dataclasses import dataclass
from typing import Protocol

import torch
from farspan.engine_ext.star.exchange import Exchange, current


class KeyExchange(Protocol):
    """One step's exchange of keys, the same collective on all hosts in each layer."""

    def pages(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The pages that the step's passes read, [num_pages, num_kv_heads, page_size, 2 * head_dim].

        kv_cache: the layer's pages, with the step's keys in them.
        """
        ...


@dataclass(frozen=True)
class SharedAnchor:
    """Host 0 sends the anchor's KV, and the others put it into their own pages."""

    exchange: Exchange
    page_ids: torch.Tensor
    """[num_pages] int64 on the device: where the anchor is in this host's cache."""

    def pages(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The cache itself, with the anchor in it."""
        is_source = self.exchange.rank == 0
        sent = kv_cache.new_empty(len(self.page_ids), *kv_cache.shape[1:])
        if is_source:
            torch.index_select(kv_cache, 0, self.page_ids, out=sent)
        self.exchange.send_pages(sent)
        if not is_source:
            kv_cache.index_copy_(0, self.page_ids, sent)
        return kv_cache


@dataclass(frozen=True)
class GatheredKeys:
    """All hosts' pages of the context so far, for one layer at a time; the cache keeps this host's alone."""

    exchange: Exchange
    page_ids: torch.Tensor
    """[num_pages] int64 on the device, as many on all hosts: this host's pages, some twice where it has fewer."""

    def pages(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """[num_hosts * num_pages, …]: by rank, each host's in the order of its request."""
        return self.exchange.gather_pages(kv_cache.index_select(0, self.page_ids).contiguous())


def longest_kv_len(max_model_len: int) -> int:
    """Most keys of a pass, in tokens: those of all hosts where they gather each other's."""
    exchange = current()
    return max_model_len * (exchange.num_hosts if exchange is not None and exchange.gathers_keys else 1)


def largest_gathered_keys(query: torch.Tensor, num_kv_heads: int, max_model_len: int) -> torch.Tensor | None:
    """As much memory as a layer's gathered keys take where every host has all that it can, for vLLM's profile to see.

    query: [num_tokens, num_q_heads, head_dim]. None where keys are not gathered.
    """
    exchange = current()
    if exchange is None or not exchange.gathers_keys or query.device.type == "cpu":
        return None
    return query.new_empty(exchange.num_hosts + 1, max_model_len, num_kv_heads, 2 * query.shape[2])
