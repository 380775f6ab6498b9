"""Tile shapes and other constants of the kernels, each with the hardware and the date that it was tuned on.

A comment says where a constant was only compiled for a device and not run there, or was not measured.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class PrefillConfig:
    """How `paged_prefill` cuts its work into programs."""

    block_t: int
    """Query tokens of a program, a power of two."""
    heads_per_tile: int
    """Query heads of one KV head that a program computes together."""
    block_n: int
    """Keys per step; divides the block size of the lists."""
    num_warps: int
    num_stages: int
    use_tma: bool
    """Load keys and values through the tensor copy engine; the caller has made sure that the pages allow it."""
    narrow_ids: bool = False
    """Read block ids of lists as 16 bits where the longest sequence allows it: fewer registers."""
    recomputes: bool = False
    """Compute loop invariants again in every step: fewer registers, more instructions."""

    @property
    def block_m(self) -> int:
        """Rows of a program: its tokens times its heads, the number of heads padded to a power of two."""
        return self.block_t * next_power_of_2(self.heads_per_tile)


def next_power_of_2(number: int) -> int:
    """The smallest power of two at or above a positive number."""
    return 1 << (number - 1).bit_length()


@lru_cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for the CPU, where kernels run in Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache
def prefill_config(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    block_size: int,
    tokens_per_tile: int,
    heads_that_share: int,
    keys_in_a_row: int,
    has_turn: bool,
    has_lists: bool,
) -> PrefillConfig:
    """Choose the tile shapes of `paged_prefill`.

    capability: of the device, (0, 0) for the interpreter.
    block_size: tokens per KV block and per query tile, 64 or 128.
    tokens_per_tile: the most tokens that a query tile can have.
    heads_that_share: query heads that read the same keys, values and block lists.
    keys_in_a_row: n, at most 128, if every n keys from a multiple of n on are in consecutive rows of memory that the
        copy engine can read; 0 where it cannot read the cache.
    has_turn: whether the query has two rotations.
    has_lists: whether tiles read the blocks of lists.
    """
    # Rows per program, keys per step, warps, stages. Shapes marked "compiled only" were compiled for 8.0 and 9.0: they
    # have no spills in 16-bit types and stay within the 99 KiB of shared memory that 8.6 and 8.9 have.
    is_hopper = capability[0] == 9
    if dtype == torch.float32:
        # A float32 product is three tf32 products, which need more registers. Compiled only.
        rows, block_n, num_warps, num_stages = (16, 32, 4, 2) if head_dim <= 128 else (16, 16, 8, 2)
    elif head_dim > 128:
        # Compiled only.
        rows, block_n, num_warps, num_stages = (128 if is_hopper and not has_turn else 64, 32, 8, 2)
    elif not is_hopper:
        # Compiled only.
        rows, block_n, num_warps, num_stages = 128, 64 if head_dim <= 64 else 32, 8, 3
    elif head_dim > 64 and keys_in_a_row >= 128 and block_size >= 128:
        # H100 80GB, 2026-11-22, 32 query heads on 8: 580 TFLOP/s dense at 128K; two buffers of 128 keys 448, four of
        # 64 keys 457.
        rows, block_n, num_warps, num_stages = 128, 128, 8, 3
    else:
        # H100 80GB, 2026-11-22. Heads of 64, 16 sequences of 65536 tokens, 8 heads, both directions: 314 ms; with 128
        # keys 493 ms, through the copy engine 406 ms.
        rows, block_n, num_warps, num_stages = 128, 64, 8, 4

    block_t = min(block_size, next_power_of_2(tokens_per_tile), rows)
    heads_per_tile = max(
        heads
        for heads in range(1, heads_that_share + 1)
        if heads_that_share % heads == 0 and (heads == 1 or block_t * next_power_of_2(heads) <= rows)
    )
    # The tensor cores take no fewer than 16 rows.
    block_t = max(block_t, 16 // next_power_of_2(heads_per_tile))
    block_m = block_t * next_power_of_2(heads_per_tile)
    use_tma = is_hopper and dtype != torch.float32 and head_dim > 64 and keys_in_a_row >= min(block_n, block_size)
    return PrefillConfig(
        block_t=block_t,
        heads_per_tile=heads_per_tile,
        block_n=min(block_n, block_size),
        # Programs with fewer rows use 4 warps, but wide heads need the registers of all warps.
        num_warps=num_warps if block_m == rows or (head_dim > 128 and block_m >= 64) else 4,
        num_stages=num_stages,
        use_tma=use_tma,
        # When no register is free, ptxas serialises the exponentials of a step, and nothing else runs meanwhile. Both
        # options together took 3 to 7 % less time than none, narrow_ids alone 1 to 2 % less: a chunk of 16K tokens
        # after 112K, and 64K, at 13 % density (H100 80GB, 2026-11-22; docs/decisions/prefill-schedule.md). Judged by
        # the compiled instructions only: narrow_ids also helps with 64 keys per step and with heads of 256, recomputes
        # does not; heads of 64 need neither.
        narrow_ids=has_lists and head_dim > 64,
        recomputes=has_lists and use_tma and block_n == 128,
    )


@dataclass(frozen=True)
class HopperPrefillConfig:
    """How the Gluon kernel of Hopper walks through its work."""

    heads_in_a_row: int
    """Query heads whose programs of one tile are neighbours, a divisor of their number."""
    num_stages: int
    """Tiles of keys, and of values, in shared memory."""


@lru_cache
def hopper_prefill_config(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    block_size: int,
    page_size: int,
    tokens_per_tile: int,
    num_heads: int,
    num_kv_heads: int,
) -> HopperPrefillConfig | None:
    """Choose how the Gluon kernel computes a prefill whose cache the copy engine can read; None where it does not.

    capability: of the device, (0, 0) for the interpreter. block_size: tokens per KV block and per query tile.
    page_size: tokens of a page, 0 where each request is one page. tokens_per_tile: the most tokens that a query tile
    can have. num_heads, num_kv_heads: of queries, and of keys.
    """
    if capability[0] != 9 or dtype not in (torch.float16, torch.bfloat16) or head_dim not in (64, 128):
        return None
    if block_size != 128 or (page_size % 128 and page_size not in (16, 32, 64)):
        return None
    # A program computes 128 rows of one head, however many tokens the tile has. The bound was not measured.
    if tokens_per_tile <= 64:
        return None
    # H100 80GB, 2026-11-28, 32 query heads on 8 of 128, TFLOP/s over the blocks read, against the portable kernel: one
    # list per head of density 0.3 at 64K 620 and 457, one per KV head 651 and 458, density 0.1 and 16K behind 112K 569
    # and 399; dense 645 and 519 at 8K, 630 and 570 at 128K; heads of 64 457 and 390. Heads in a row 4, 8 and 32 differ
    # by less than 5 %, 8 is best in long chunks. H200: lists of heads of 64, density 0.7, 8K behind 24K 468 and 285.
    # Those are of slower loops than the kernel has. With its own (H200, 2026-11-28, run 20261128-8e55d7) dense prefill
    # without a turn stays with FlashAttention 3: 672 against 686 at 8K, 690 against 722 at 32K, heads of 64 483 against
    # 554. A turn at 64K takes 54.9 ms, 53.4 without, FlashAttention 3 52.6. Stages: heads of 64 at 32K take 9.16 ms
    # with 4 and 9.21 with 2, with a turn 9.14 and 9.53. Pages below 128 have only been checked, not timed.
    heads_in_a_row = (2 if num_kv_heads % 2 == 0 else 1) * (num_heads // num_kv_heads)
    return HopperPrefillConfig(heads_in_a_row, num_stages=4 if head_dim <= 64 else 2)


# Lists of at most this many blocks go to the short-list kernel. For lists of 3 blocks, with pointers, it takes 2.6 to
# 2.7 ms and the paged kernel 3.3 (16 sequences of 65536 tokens, 8 heads of 64; H100 80GB, 2026-11-22). The bound itself
# was not measured.
SHORT_LIST_BLOCKS = 16


@dataclass(frozen=True)
class ShortListConfig:
    """How the short-list kernel steps through the keys of a tile."""

    block_n: int
    """Keys per step; divides the block size of the lists."""
    num_warps: int
    num_stages: int
    use_tma: bool = False
    """Load keys and values, and store whole tiles, through the tensor copy engine."""
    add_by_hand: bool = False
    """Add each step's product to the output outside the tensor cores, which needs fewer registers."""
    max_registers: int | None = None
    """Per thread; None for no bound."""


@lru_cache
def short_list_config(
    head_dim: int, block_size: int, capability: tuple[int, int], *, has_rows: bool, has_tail: bool, causal: bool
) -> ShortListConfig:
    """Choose the steps of the short-list kernel.

    has_rows: whether the copy engine can read keys and values, and write the output, as rows of tokens.
    has_tail: whether a sequence may end inside a block.
    causal: whether every step has masks, with which the copy engine cannot load.

    H100 80GB, 2026-11-22, on the case of `SHORT_LIST_BLOCKS`, cool chip, without LSE: 2.19 ms with 128 keys per step in
    128 registers, so that two programs share a multiprocessor (with two stages 2.41; in 158 registers, with LSE, 3.21);
    64 keys 2.37; 64 keys through pointers, with one division per element and LSE, 2.7. With a second loop for a tail,
    128 keys per step do not fit in 128 registers. The others were compiled only. See docs/decisions/short-lists.md.
    """
    num_warps = 8 if block_size == 128 else 4
    use_tma = has_rows and capability[0] == 9 and not causal
    if use_tma and head_dim <= 64 and block_size == 128 and not has_tail:
        return ShortListConfig(128, num_warps, 3, use_tma=True, add_by_hand=True, max_registers=128)
    if head_dim > 64:
        return ShortListConfig(64, num_warps, 2, use_tma=use_tma)
    return ShortListConfig(64, num_warps, 3 if block_size == 128 else 4, use_tma=use_tma)


# Fewest keys per split: where all programs run at once, since more splits hide latency, and where programs queue, since
# there every further split only adds its start. H100 80GB, 2026-11-22: 1 x 1K takes 8.1 us in 8 splits, 9.7 in 4;
# 256 x 1K 359 us in 1, 397 in 4.
DECODE_MIN_SPLIT_KEYS = 128
DECODE_MIN_QUEUED_SPLIT_KEYS = 512

# Programs that run on a multiprocessor at once, as its shared memory allows. One program per multiprocessor is enough
# for the full bandwidth; time is lost where some multiprocessors have more programs than others. H100 80GB, 2026-11-22:
# 1 x 128K takes 190 us in 16 splits (128 programs), 199 in 24; 8 x 32K 364 us in 2, 4 or 6 splits (at most 384
# programs), 403 in 8.
DECODE_PROGRAMS_PER_SM = 3

# Programs per multiprocessor that a batch is cut into where its tiles alone fill the device: with small programs no
# long request is left running alone at the end, but programs without keys cost time. H100 80GB, 2026-11-22, 32
# requests in 1 and in 8 splits: of 8K each 359 and 367 us, of 4K to 8K 293 and 285 us, of 2K except one of 128K 2215
# and 530 us.
DECODE_QUEUED_PROGRAMS_PER_SM = 16

# Most splits, so that the combination stays small. Not measured.
DECODE_MAX_SPLITS = 128

# Bytes of keys and values in each pipeline stage: with three stages two programs fit into Hopper's 227 KiB of shared
# memory, one into the 99 KiB of the smallest devices. H100 80GB, 2026-11-22.
DECODE_STAGE_BYTES = 32 * 1024
DECODE_STAGES = 3


@dataclass(frozen=True)
class DecodeConfig:
    """How a program of decode reads its keys."""

    keys_per_step: int
    """A power of two, at least 16."""
    key_groups: int = 0
    """See `fp8_keys`; 0 for pages that it does not read."""
    num_stages: int = DECODE_STAGES
    num_warps: int = 4


@lru_cache
def decode_config(
    head_dim: int, dtype: torch.dtype, *, is_fp8: bool, num_rows: int, is_alone: bool = False
) -> DecodeConfig:
    """How decode reads keys for so many rows of queries of a dtype.

    is_fp8: pages are float8, else of the query's dtype. is_alone: see `paged_decode`.

    float8, H200, 2026-11-28, printed by `benchmarks.tune_decode_fp8`, us, beside bfloat16: 8 x 32K in 6 splits 140 and
    257, 32 x 8K in 8 splits 149 and 260; with 4 groups of 32 keys 169 and 176. Alone, 1 x 128K in 16 splits 84 and 157
    with 4 groups of 32 keys, 120 with one of 64; 1 x 8K 15.4 and 14.3, bfloat16 16.9. Heads other than of 128 were
    compiled only.
    """
    block_d = next_power_of_2(head_dim)
    keys = min(64, max(16, DECODE_STAGE_BYTES // (2 * block_d * (1 if is_fp8 else dtype.itemsize))))
    # With 64 rows the products decide, and the instructions are as many with pairs of components as without.
    if not is_fp8 or dtype == torch.float32 or block_d < 32 or num_rows >= 64:
        return DecodeConfig(keys)
    # A warp with keys of its own has sums of its own too, in registers, and adding them up takes time at the end.
    if is_alone and num_rows * block_d <= 16 * 128:
        return DecodeConfig(128, key_groups=4)
    return DecodeConfig(keys, key_groups=1)


# Pairs of token and query head that a program holds where requests have several tokens, half as many in heads of 256.
# Compiled only.
DECODE_MAX_ROWS = 64


# Programs per pass of flex's estimate, to fill the device at batch 1: 4 for each of 132 multiprocessors. H100, 2026-11.
ESTIMATE_PROGRAMS = 528


@dataclass(frozen=True)
class TileRowsConfig:
    """How the selection by sampled rows cuts its work into programs."""

    block_m: int
    """Sampled rows of a program, of all query heads of a KV head."""
    num_warps: int
    num_stages: int
    use_tma: bool
    """Load keys through the tensor copy engine."""


@lru_cache
def tile_rows_config(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], *, block_size: int, keys_in_a_row: int
) -> TileRowsConfig:
    """Choose the programs of the selection by sampled rows.

    capability: of the device, (0, 0) for the interpreter. block_size: keys of a step. keys_in_a_row: keys that the copy
    engine finds in one row of memory after another; 0 where it cannot read the cache.
    """
    use_tma = capability[0] == 9 and dtype != torch.float32 and head_dim >= 64
    use_tma = use_tma and keys_in_a_row > 0 and keys_in_a_row % block_size == 0
    # Keys in flight: three tiles where two programs still share a multiprocessor, fewer where one would not fit. H100
    # 80GB, 2026-11-28, a chunk of 16K at 128K, 32 rows of every 512 queries, ms a layer. 32 query heads on 8 of 128:
    # 2.80 with 64 rows and 3 stages (3.27 with pointers, 4.10 with 2 stages, 3.40 to 3.64 with 128 rows). 14 on 2 of
    # 64: 0.99 with 3 stages, 0.83 with 2 (but 0.130 where 3 take 0.113, 8K at 32K), 0.98 to 1.28 with 128 rows.
    query_bytes = 64 * max(next_power_of_2(head_dim), 16) * (4 if dtype == torch.float32 else 2)
    key_bytes = query_bytes * block_size // 64
    room = SHARED_MEMORY_KIB.get(capability, SMALLEST_SHARED_MEMORY_KIB) * 1024
    for programs, num_stages in ((2, 3), (1, 3), (1, 2)):
        if programs * (query_bytes + num_stages * key_bytes) <= room:
            return TileRowsConfig(block_m=64, num_warps=4, num_stages=num_stages, use_tma=use_tma)
    return TileRowsConfig(block_m=64, num_warps=4, num_stages=1, use_tma=use_tma)


@dataclass(frozen=True)
class HopperLogSumsConfig:
    """How the Gluon kernel of Hopper makes the pass over the keys in selection by sampled rows."""

    num_stages: int
    """Key tiles in shared memory."""

    def num_splits(self, num_programs: int, num_blocks: int) -> int:
        """Splits of the keys in which the last round of programs leaves few multiprocessors idle."""

        def duration(splits: int) -> int:
            # In blocks; starting a program takes about as long as two.
            rounds = -(-num_programs * splits // HOPPER_MULTIPROCESSORS)
            return rounds * (-(-num_blocks // splits) + 2)

        return min(range(1, max(min(num_blocks // 4, 64), 1) + 1), key=duration)


HOPPER_MULTIPROCESSORS = 132


@lru_cache
def hopper_log_sums_config(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    block_size: int,
    page_size: int,
    rows_per_padded_spans: int,
) -> HopperLogSumsConfig | None:
    """Choose how the Gluon kernel makes the pass over keys that the copy engine can read; None where it does not.

    capability: of the device, (0, 0) for the interpreter. block_size: tokens per KV block. page_size: tokens of a page.
    rows_per_padded_spans: sampled rows, over the query heads of a KV head, in the number of spans to which those of a
    request are padded.
    """
    if capability[0] != 9 or dtype not in (torch.float16, torch.bfloat16) or head_dim not in (64, 128):
        return None
    if block_size != 128 or (page_size % 128 and page_size not in (16, 32, 64)):
        return None
    # A program has 256 rows of one request. H200, 2026-11-28, 16 rows of every 128 queries, a chunk of 8K at 128K, ms a
    # layer: 32 query heads on 8 of 128 2.01, the portable kernel 2.89, FlashAttention 3 on the chunk 24.1; 14 on 2 of
    # 64 0.63, 1.06 and 7.28. Slower by 10 to 20 %: two warp groups of 64 rows that multiply the next tile beside the
    # exponentials of this one, and every fourth exponential by a polynomial (docs/decisions/tile-rows.md).
    return HopperLogSumsConfig(num_stages=4) if rows_per_padded_spans % 256 == 0 else None


# Selection by tile rows: TILE_ROWS rows of every TILE_ROWS_SPAN_LEN query tokens choose. By the choice of the others,
# half of them may lose at most this share of what gamma allows to be lost: half chooses worse than all of them do, but
# single rows keep less than their mean. SmolLM2-135M and Qwen2.5-Coder-0.5B, 2026-11; docs/decisions/tile-rows.md
TILE_ROWS_SPAN_LEN = 128
TILE_ROWS = 16
TILE_ROWS_LOST_SHARE = 0.8

# Programs of the pass over sampled rows: two for each of 132 multiprocessors; fewer are cut into splits of the keys.
TILE_ROWS_PROGRAMS = 264
TILE_ROWS_MIN_SPLIT_BLOCKS = 8

# Most bytes of a chunk's log-sums; KV heads beyond are done one after the other. A chunk of 16K tokens at 128K, 32
# query heads, takes 268 MB at 16 rows per 128 tokens.
TILE_ROWS_MAX_BYTES = 256 * 2**20

# Most shared memory per program, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
SMALLEST_SHARED_MEMORY_KIB = 99

# Flex's coverage is measured on rows that are early in equal parts of the chunk, spread over SAMPLE_SPREAD tokens. In
# chunks of 2^n tokens none of the default four is then the first row of a query block, where heads that look a few
# tokens back lose more than elsewhere. Chosen for those places, not measured.
SAMPLE_SPREAD = 512
SAMPLE_EARLINESS = 0.25
SAMPLE_FIRST_PLACE = 0.37

# Where flex pays, see `crossover.sparse_pays`. FlashAttention 3 computes 690 to 735 TFLOP/s in long calls, heads of 64
# 430 to 535. Sparse attention, as a share of its speed: the portable kernel 0.63 to 0.69 in heads of 128, 0.5 to 0.6 in
# heads of 64 (H100 80GB, 2026-11-28, chunks of 2K and 8K at 4K to 128K, densities 0.2 to 0.7); the kernel of Hopper
# 0.87 to 0.95 and 0.78 to 0.86 (H200, 2026-11-28, chunks of 2K to 16K at 16K to 128K, densities 0.1 to 0.7). Selection
# takes 0.12 to 0.13 of FlashAttention 3's time, 0.15 in heads of 64, by the portable kernel, and 0.08 to 0.1, 0.09 to
# 0.12, by that of Hopper (H200); at 8K keys 0.06 ms more. The host takes 0.15 to 0.28 ms for the launches of a flex
# layer (benchmarks/data/host_side.csv), p80 of a busy machine included, and took up to 0.5, the bound: where dense
# attention takes no longer, nothing is saved. With 0.3 short chunks far into a prompt would be sparse; their first
# tokens have not been measured (docs/decisions/tile-rows.md).
DENSE_TFLOPS = {64: 500, 128: 710}
# Launches with fewer programs than this share of the multiprocessors are cut along the keys by FlashAttention 3.
DENSE_SPLIT_SHARE = 0.8
FLEX_SPEED = {"portable": {64: 0.5, 128: 0.66}, "hopper": {64: 0.8, 128: 0.9}}
FLEX_SELECTION_SHARE = {"portable": {64: 0.15, 128: 0.13}, "hopper": {64: 0.1, 128: 0.09}}
FLEX_SELECTION_MS = 0.06
FLEX_HOST_MS = 0.5
# Densities of chunks that heads hardly exceed at gamma 0.95, by the fewest keys. Means over whole prompts, whose last
# chunks are sparser: 0.45 to 0.48 at 8K, 0.34 to 0.41 at 16K, 0.26 to 0.36 at 32K (Qwen2.5-Coder 0.5B and 1.5B).
FLEX_EXPECTED_DENSITY = ((65536, 0.3), (32768, 0.35), (16384, 0.4), (8192, 0.45), (4096, 0.6), (0, 1.0))

# Pages between host memory and the device: 32 KB a step and 16 warps reach 50 GB/s from 4 programs on (H100 PCIe 5,
# pinned memory, 2026-11-22). Each program beside attention keeps a multiprocessor from it: 16 cost decode 9 %, 4 cost
# it 3 %.
COPY_BLOCK_WORDS = 8192
COPY_WARPS = 16
COPY_PROGRAMS_PER_SM = 1
STAGING_PROGRAMS = 4

SELECT_RECENT_TOKENS = 1024
"""The last so many tokens of a request, and its first page, are read wherever they lie."""
SELECT_STEPS = 20
"""Halvings of the interval of shares, exp(-46) to exp(18) of a head's mass, in which the least share that is read is
found: to 6e-5, relative."""
SELECT_TILE = 4096
"""Shares that a program holds at a time, over the query heads of a KV head. Not measured."""
SCORE_PROGRAMS_PER_SM = 8
"""Of one warp group each; they share the pages of a request and KV head. Not measured."""
