"""What every launcher takes: a varlen batch on paged KV, and the pages that hold its keys and values."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
"""The dtype of pages with 8 bits a number; its largest is `FP8_MAX`, and it has no infinity."""
FP8_MAX = 448.0


@dataclass(frozen=True)
class PagedBatch:
    """Requests with a chunk of query tokens each, over keys in pages.

    Request r owns rows `[query_start_loc[r], query_start_loc[r + 1])` of the query and sees keys `[0, kv_lens[r])` of
    its row of the block table. All tensors are on the device of the query.
    """

    query_start_loc: torch.Tensor
    """[num_reqs + 1] int32, starting at 0."""
    kv_lens: torch.Tensor
    """[num_reqs] int32: keys of each request, this step's included; 0 for padding."""
    block_table: torch.Tensor
    """[num_reqs, max_pages] int32, rows contiguous; entries past a request's last page may be anything."""
    max_query_len: int
    """Upper bound of the chunk lengths, known on the host."""
    max_kv_len: int
    """Upper bound of `kv_lens`, known on the host."""
    first_pos: torch.Tensor | None = None
    """[num_reqs] int32: position of each chunk's first query, where keys count from position 0. None: every chunk is
    the last of its keys, so that it begins at `kv_len - query_len`."""
    launches: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What launchers keep for the next layer that computes the same batch, by what it depends on."""

    @property
    def num_reqs(self) -> int:
        return self.kv_lens.shape[0]

    def first_positions(self) -> torch.Tensor:
        """[num_reqs] int32: position of each chunk's first query."""
        return self.kv_lens - self.query_start_loc.diff() if self.first_pos is None else self.first_pos


@dataclass(frozen=True)
class KVView:
    """Keys and values of some of a layer's KV heads, in pages: vLLM's cache, or any tensor of that form."""

    pages: torch.Tensor
    """[num_pages, num_kv_heads, page_size, 2 * head_dim], a token's key and value side by side; any strides with a
    contiguous last axis. Of the query's dtype, or float8_e4m3fn."""
    first_kv_head: int = 0
    """Which of the layer's KV heads is the first in `pages`."""
    host_pages: torch.Tensor | None = None
    """[num_blocks, num_kv_heads, page_size, 2 * head_dim] in host memory that the device can address, tokens as far
    apart as in `pages`. Where it is given, an entry e of a block table is page e of `pages`, or, if negative, page
    -1 - e of these. Decode reads both; prefill needs all pages on the device."""
    key_scale: float = 1.0
    """What stored keys are multiplied by, above 0; 1 unless they are float8. Launchers leave it to their `scale`."""
    value_scale: float = 1.0
    """What stored values are multiplied by, above 0; 1 unless they are float8."""
    are_adjacent: bool = False
    """Whether the batch is of one request, whose page i is page i of `pages`, and tokens of two pages are as far apart
    as those of one: a kernel then need not know of pages."""

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[1]

    @property
    def page_size(self) -> int:
        return self.pages.shape[2]

    @property
    def head_dim(self) -> int:
        return self.pages.shape[3] // 2

    @property
    def is_fp8(self) -> bool:
        """Whether the pages are float8_e4m3fn."""
        return self.pages.dtype == FP8

    def of_heads(self, kv_heads: slice) -> "KVView":
        """The view of the layer's KV heads [start, stop), all of which must be in `pages`."""
        if kv_heads.start == self.first_kv_head and kv_heads.stop == self.first_kv_head + self.num_kv_heads:
            return self
        first, last = kv_heads.start - self.first_kv_head, kv_heads.stop - self.first_kv_head
        assert 0 <= first < last <= self.num_kv_heads, (kv_heads, self.first_kv_head, self.num_kv_heads)
        host_pages = None if self.host_pages is None else self.host_pages[:, first:last]
        return replace(self, pages=self.pages[:, first:last], first_kv_head=kv_heads.start, host_pages=host_pages)

    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, two [num_pages, num_kv_heads, page_size, head_dim] views of the same strides."""
        return self.keys, self.pages.narrow(3, self.head_dim, self.head_dim)

    def tokens(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of adjacent pages, [num_tokens, num_kv_heads, head_dim] views, or fewer tokens."""
        assert self.are_adjacent
        pages = self.pages.transpose(1, 2)
        # Not a copy: tokens are as far apart from page to page.
        tokens = pages.view(-1, *pages.shape[2:])[:num_tokens]
        return tokens[..., : self.head_dim], tokens[..., self.head_dim :]

    @cached_property
    def keys(self) -> torch.Tensor:
        """[num_pages, num_kv_heads, page_size, head_dim], a view."""
        return self.pages.narrow(3, 0, self.head_dim)
