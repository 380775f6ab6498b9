"""Inputs of the benchmarks: a varlen batch over a paged KV cache, its pages in random order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.calibrated import calibrated_qkv

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class AttentionShape:
    """The shape of an attention layer; the defaults are those of Llama 3 8B, with pages of 64 KiB per KV head."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def label(self) -> str:
        """`hq32-hkv8-d128-bf16`, the tail of a case's name."""
        return f"hq{self.num_q_heads}-hkv{self.num_kv_heads}-d{self.head_dim}-{DTYPE_NAMES[self.dtype]}"

    @property
    def scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return self.head_dim**-0.5


LLAMA_8B = AttentionShape()
# For dry runs on the CPU. float32, because Triton's interpreter computes products of bfloat16 wrongly.
TINY = AttentionShape(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32)


@dataclass(frozen=True)
class PagedBatch:
    """A batch of requests: the last `query_lens_cpu[i]` of the `seq_lens_cpu[i]` tokens of request i are queries."""

    shape: AttentionShape
    query: torch.Tensor
    """[num_tokens, num_q_heads, head_dim]."""
    kv_cache: torch.Tensor
    """[num_pages, num_kv_heads, page_size, 2 * head_dim], contiguous: vLLM's layout LBHNC."""
    block_table: torch.Tensor
    """[num_reqs, max_pages] int32."""
    seq_lens: torch.Tensor
    """[num_reqs] int32."""
    query_start_loc: torch.Tensor
    """[num_reqs + 1] int32."""
    query_lens_cpu: list[int]
    seq_lens_cpu: list[int]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all requests."""
        shape = self.shape
        return sum(self.seq_lens_cpu) * shape.num_kv_heads * 2 * shape.head_dim * self.kv_cache.element_size()

    @property
    def causal_flops(self) -> float:
        """Floating-point operations of causal attention: 4 * head_dim for each (query, key) pair and query head."""
        lens = zip(self.query_lens_cpu, self.seq_lens_cpu, strict=True)
        pairs = sum(q * (kv - q) + q * (q + 1) / 2 for q, kv in lens)
        return 4.0 * self.shape.head_dim * self.shape.num_q_heads * pairs


@dataclass(frozen=True)
class PrefillCase:
    """One request: the last `query_len` of `seq_len` tokens are computed."""

    query_len: int
    seq_len: int
    shape: AttentionShape = LLAMA_8B

    @property
    def name(self) -> str:
        chunk = "" if self.query_len == self.seq_len else f"q{self.query_len}-"
        return f"{chunk}n{self.seq_len}-b1-{self.shape.label}"


def make_paged_batch(
    query_lens: Sequence[int], seq_lens: Sequence[int], shape: AttentionShape, *, seed: int = 0
) -> PagedBatch:
    """Make a batch of standard normal queries, keys and values.

    Its attention is near-uniform: right for dense timings, meaningless for sparse ones.
    """
    device = default_device()
    generator = torch.Generator(device).manual_seed(seed)
    pages_of = [-(-length // shape.page_size) for length in seq_lens]
    num_pages = sum(pages_of)
    kv_cache = torch.randn(
        num_pages, shape.num_kv_heads, shape.page_size, 2 * shape.head_dim,
        dtype=shape.dtype, device=device, generator=generator,
    )  # fmt: skip
    query = torch.randn(
        sum(query_lens), shape.num_q_heads, shape.head_dim, dtype=shape.dtype, device=device, generator=generator
    )
    order = torch.randperm(num_pages, device=device, generator=generator).to(torch.int32)
    block_table = torch.zeros(len(seq_lens), max(pages_of), dtype=torch.int32, device=device)
    for request, pages in enumerate(order.split(pages_of)):
        block_table[request, : len(pages)] = pages
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).to(device)
    return PagedBatch(
        shape, query, kv_cache, block_table, torch.tensor(seq_lens, dtype=torch.int32, device=device), starts,
        list(query_lens), list(seq_lens),
    )  # fmt: skip


def make_calibrated_batch(query_len: int, seq_len: int, shape: AttentionShape, *, seed: int = 0) -> PagedBatch:
    """Make one request with calibrated attention, its pages in random order: for sparse timings."""
    device = default_device()
    batch = make_paged_batch([query_len], [seq_len], shape, seed=seed)
    query, key, value = calibrated_qkv(
        seq_len, shape.num_q_heads, shape.num_kv_heads, shape.head_dim,
        seed=seed, query_len=query_len, dtype=shape.dtype, device=device,
    )  # fmt: skip
    batch.query.copy_(query)
    position = torch.arange(seq_len, device=device)
    page = batch.block_table[0, position // shape.page_size].long()
    batch.kv_cache[page, :, position % shape.page_size] = torch.cat([key, value], dim=-1)
    return batch


def contiguous_kv(batch: PagedBatch, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather one request's keys and values: two [seq_len, num_kv_heads, head_dim] tensors, in the cache's dtype."""
    length = batch.seq_lens_cpu[request]
    num_pages = -(-length // batch.shape.page_size)
    pages = batch.kv_cache[batch.block_table[request, :num_pages].long()]
    key, value = pages.transpose(1, 2).flatten(0, 1)[:length].split(batch.shape.head_dim, dim=-1)
    return key.contiguous(), value.contiguous()
