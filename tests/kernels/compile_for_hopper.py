"""Compile kernels for Hopper without a GPU; prints their registers and stack bytes as JSON. Run by `test_compiled`.

It needs a separate process: the other tests run kernels in Triton's interpreter, which compiles nothing.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from farspan.kernels import (
    combine,
    decode,
    kv_gather,
    kv_write,
    page_bounds,
    page_choice,
    selected_decode,
    static_block_lists,
    tuning,
)
from farspan.kernels import prefill as paged_prefill
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.contiguous import attention as contiguous
from farspan.kernels.contiguous import short_lists
from farspan.kernels.flex import tile_rows
from farspan.kernels.flex.spans import SpanRule, make_spans
from farspan.kernels.flex.types import NO_LIMIT, Budget
from farspan.kernels.hopper.log_sums_kernel import hopper_log_sums_kernel
from farspan.kernels.hopper.prefill_kernel import hopper_prefill_kernel
from farspan.kernels.rotary_turn import make_string_turn
from farspan.kernels.tiles import BlockLists, make_prefill_tiles
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HOPPER = 90


class AbsentHopper(DriverBase):
    """A driver with what Triton asks for before it launches anything."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", HOPPER, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> None:
        return None


def compiled(kernel: Any, call: Callable[[], object], *others: Any) -> dict[str, int]:
    """Registers and bytes of stack, per thread, of the kernel that `call` would launch, among others."""
    runs, results = {each: each.run for each in (kernel, *others)}, []
    kernel.run = lambda *args, **kwargs: results.append(runs[kernel](*args, **(kwargs | {"warmup": True})))
    for other in others:
        other.run = lambda *args, **kwargs: None
    try:
        call()
    finally:
        for each, run in runs.items():
            each.run = run
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(results[0].asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {"registers": int(found[1]), "stack": int(found[2])}


def prefill(
    hopper: bool, head_dim: int = 128, *, has_lists: bool = True, has_turn: bool = False, page_size: int = 128
) -> None:
    """Launch prefill of 1,024 tokens, with one list per query head or none, by the chosen or the portable kernel."""
    query = torch.empty(1024, 32, head_dim, dtype=torch.bfloat16)
    tiles = make_prefill_tiles([0, 1024], [1024], 128, query.device)
    portable = tuning.prefill_config(
        head_dim,
        query.dtype,
        (HOPPER // 10, HOPPER % 10),
        block_size=128,
        tokens_per_tile=128,
        heads_that_share=1,
        keys_in_a_row=page_size,
        has_turn=has_turn,
        has_lists=has_lists,
    )
    paged_prefill.prefill_attention(
        query,
        *KVView(torch.empty(2048 // page_size, 8, page_size, 2 * head_dim, dtype=torch.bfloat16)).split(),
        PagedBatch(
            torch.tensor([0, 1024], dtype=torch.int32),
            torch.tensor([1024], dtype=torch.int32),
            torch.zeros(1, 2048 // page_size, dtype=torch.int32),
            max_query_len=1024,
            max_kv_len=1024,
        ),
        tiles,
        0.1,
        block_lists=BlockLists(
            torch.zeros(32, tiles.num_tiles, 16, dtype=torch.int32), torch.ones(32, tiles.num_tiles, dtype=torch.int32)
        )
        if has_lists
        else None,
        turn=make_string_turn(torch.ones(head_dim // 2), 5, 1, True, query.device) if has_turn else None,
        config=None if hopper else portable,
    )


def select_by_tile_rows(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    has_turn: bool = False,
    config: tuning.TileRowsConfig | None = None,
) -> None:
    """Launch selection for a chunk of 1,024 tokens behind as many, on pages of 128, by the chosen kernel or form."""
    query = torch.empty(1024, num_q_heads, head_dim, dtype=torch.bfloat16)
    tiles = make_prefill_tiles([0, 1024], [2048], 128, query.device)
    tile_rows.tile_row_lists(
        query,
        KVView(torch.empty(16, num_kv_heads, 128, 2 * head_dim, dtype=dtype)),
        PagedBatch(
            torch.tensor([0, 1024], dtype=torch.int32),
            torch.tensor([2048], dtype=torch.int32),
            torch.zeros(1, 17, dtype=torch.int32),
            max_query_len=1024,
            max_kv_len=2048,
        ),
        tiles,
        make_spans([0, 1024], [2048], tiles, SpanRule(128, 16)),
        0.1,
        Budget(0.95, 0.0, 8, NO_LIMIT),
        turn=make_string_turn(torch.ones(head_dim // 2), 5, 1, True, query.device) if has_turn else None,
        config=config,
    )


def decode_from_both_pools() -> None:
    """Launch decode of heads of 128 over pages of 128, some of which lie in host memory."""
    pages = torch.empty(16, 8, 128, 256, dtype=torch.bfloat16)
    decode.paged_decode(
        torch.empty(1, 32, 128, dtype=torch.bfloat16),
        KVView(pages, 0, torch.empty_like(pages)),
        PagedBatch(
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([1024], dtype=torch.int32),
            torch.zeros(1, 16, dtype=torch.int32),
            max_query_len=1,
            max_kv_len=1024,
        ),
        0.1,
        num_splits=1,
        min_split_keys=128,
    )


def decode_drafts(dtype: torch.dtype, num_q_heads: int, query_len: int, is_alone: bool = False) -> None:
    """Launch decode of some tokens per request, with heads of 128, over pages of 128 of a dtype, in splits."""
    decode.paged_decode(
        torch.empty(query_len, num_q_heads, 128, dtype=torch.bfloat16),
        KVView(torch.empty(16, 8, 128, 256, dtype=dtype)),
        PagedBatch(
            torch.tensor([0, query_len], dtype=torch.int32),
            torch.tensor([1024], dtype=torch.int32),
            torch.zeros(1, 16, dtype=torch.int32),
            max_query_len=query_len,
            max_kv_len=1024,
        ),
        0.1,
        num_splits=2,
        min_split_keys=128,
        query_len=query_len,
        is_alone=is_alone,
    )


def prefill_on_fp8() -> None:
    """Launch dense prefill of 1,024 tokens with heads of 128 on pages of 128 tokens in float8."""
    query = torch.empty(1024, 32, 128, dtype=torch.bfloat16)
    batch = PagedBatch(
        torch.tensor([0, 1024], dtype=torch.int32),
        torch.tensor([1024], dtype=torch.int32),
        torch.zeros(1, 16, dtype=torch.int32),
        max_query_len=1024,
        max_kv_len=1024,
    )
    tiles = make_prefill_tiles([0, 1024], [1024], 128, query.device)
    pages = torch.empty(16, 8, 128, 256, dtype=torch.float8_e4m3fn)
    paged_prefill.paged_prefill(query, KVView(pages), batch, tiles=tiles, scale=0.1)


def of_drafts_and_fp8() -> dict[str, tuple[Any, ...]]:
    """Kernels of multi-token decode and on float8 pages, and calls of each."""
    calls: dict[str, tuple[Any, ...]] = {
        f"decode-{name}": (decode._decode_kernel, partial(decode_drafts, *shape), combine._combine_kernel)
        for name, shape in {
            "drafts": (torch.bfloat16, 32, 4),
            "most-drafts": (torch.bfloat16, 64, 8),
            "fp8": (torch.float8_e4m3fn, 32, 1),
            "fp8-alone": (torch.float8_e4m3fn, 32, 1, True),
            "fp8-drafts": (torch.float8_e4m3fn, 32, 4),
            "fp8-drafts-alone": (torch.float8_e4m3fn, 32, 4, True),
            "fp8-most-drafts": (torch.float8_e4m3fn, 64, 8),
        }.items()
    }
    key = torch.empty(4, 8, 128, dtype=torch.bfloat16)
    pages, slots = torch.empty(16, 8, 128, 256, dtype=torch.float8_e4m3fn), torch.zeros(4, dtype=torch.int64)
    calls["write-fp8"] = (kv_write._write_kv_kernel, lambda: kv_write.write_kv(key, key, pages, slots, key_scale=2.0))
    part, lses = torch.empty(8, 4, 128, dtype=torch.bfloat16), torch.empty(2, 4, 8)
    calls["add-part"] = (combine._add_kernel, lambda: combine.add_part(part.float(), lses[0], part, lses[1], out=part))
    calls["prefill-fp8"] = (paged_prefill.prefill_kernel, prefill_on_fp8)
    calls["tile-rows-fp8"] = (
        tile_rows.log_sums_kernel,
        lambda: select_by_tile_rows(32, 8, 128, torch.float8_e4m3fn),
        tile_rows.choice_kernel,
    )
    return calls


def page_copies() -> dict[str, tuple[Any, Callable[[], object]]]:
    """Kernels that move pages and tell where they lie, and calls of each."""
    slots, host = torch.empty(4, 8, 128, 256, dtype=torch.bfloat16), torch.empty(4, 9, 128, 256, dtype=torch.bfloat16)
    pools = kv_gather.PagePools(slots, (host,), torch.zeros(4, dtype=torch.int64))
    ids, staging = torch.zeros(4, dtype=torch.int32), torch.empty(2, 4, 128, 256, dtype=torch.bfloat16)
    table = torch.zeros(2, 16, dtype=torch.int32)

    def map_step() -> None:
        mapped = torch.zeros(8, dtype=torch.int64)
        kv_gather.map_step(table, ids[:2], mapped.clone(), ids, 128, 2048, table.clone(), mapped)

    calls: dict[str, tuple[Any, Callable[[], object]]] = {"map-step": (kv_gather._map_step_kernel, map_step)}
    for flag in (True, False):
        move = partial(kv_gather.move_pages, pools, ids, ids, to_host=flag)
        calls[f"move-pages-{flag}"] = (kv_gather._move_pages_kernel, move)
        stage = partial(kv_gather.stage_pages, pools, ids, slice(1, 3), staging, from_host=flag)
        calls[f"stage-pages-{flag}"] = (kv_gather._stage_pages_kernel, stage)
    return calls


def selecting() -> dict[str, tuple[Any, ...]]:
    """Kernels of selective decode, and calls of each, for heads of 128 on pages of 128."""
    pages = torch.empty(16, 8, 128, 256, dtype=torch.bfloat16)
    pools = kv_gather.PagePools(pages.transpose(0, 1).contiguous(), (), torch.zeros(8, dtype=torch.int64))
    bounds = page_bounds.make_page_bounds(8, 16, 128, 128, torch.bfloat16, pages.device)
    ids, lens = torch.zeros(4, dtype=torch.int32), torch.tensor([1024], dtype=torch.int32)
    buffers = selected_decode.make_selection_buffers(1, 8, 32, 16, pages.device)
    table = torch.zeros(1, 16, dtype=torch.int32)
    batch = PagedBatch(torch.tensor([0, 1], dtype=torch.int32), lens, table, max_query_len=1, max_kv_len=1024)
    query = torch.empty(1, 32, 128, dtype=torch.bfloat16)

    def decode_selected(by_bounds: bool) -> None:
        selected_decode.selected_decode(
            query,
            KVView(pages, 0, torch.empty_like(pages)),
            bounds,
            batch,
            0.1,
            page_choice.Rule(0.9, by_bounds),
            buffers,
            num_splits=4,
            min_split_keys=128,
            out=torch.empty_like(query),
            lse=torch.empty(32, 1),
            left=torch.empty(32, 1),
        )

    kernels = {
        "parts": decode._decode_kernel,
        "weigh": page_bounds._weigh_pages_kernel,
        "choose": page_choice._choose_pages_kernel,
        "chosen": selected_decode._decode_chosen_kernel,
        "combine": combine._combine_kernel,
    }
    choice = buffers.choice
    bound = partial(page_bounds.bound_pages, pools, bounds, ids, ids)
    listing = partial(page_choice.list_host_pages, table, lens, 128, choice.host_places, choice.num_host)
    calls: dict[str, tuple[Any, ...]] = {
        "select-bound": (page_bounds._bound_pages_kernel, bound),
        "select-list": (page_choice._list_host_pages_kernel, listing),
        "select-choose-by-bounds": (
            kernels["choose"], partial(decode_selected, True),
            *(each for name, each in kernels.items() if name != "choose"),
        ),
    }  # fmt: skip
    for name, kernel in kernels.items():
        others = [each for each in kernels.values() if each is not kernel]
        calls[f"select-{name}"] = (kernel, partial(decode_selected, False), *others)
    return calls


def main() -> None:
    triton.runtime.driver.set_active(AbsentHopper())
    for module in (paged_prefill, short_lists, tile_rows):
        module.device_capability = lambda device: (HOPPER // 10, HOPPER % 10)
    page_bounds.multiplies_bfloat16 = lambda device: True
    # It wants the tensors on a GPU, where they would be computed.
    contiguous._check = lambda *arguments: None
    kernel, gluon_kernel = paged_prefill.prefill_kernel, hopper_prefill_kernel
    log_sums, choice = tile_rows.log_sums_kernel, tile_rows.choice_kernel
    portable = tuning.TileRowsConfig(64, 4, 3, use_tma=True)
    q = torch.empty(2, 1024, 8, 64, dtype=torch.float16)
    lists = static_block_lists(
        contiguous.attention_tiles(2, 1024, 1024, device=q.device), "sink_local", sink_blocks=0, local_blocks=3
    )
    print(
        json.dumps(
            {
                "dense-d64": compiled(kernel, lambda: contiguous.attention(q, q, q)),
                "lists-d128": compiled(kernel, partial(prefill, False)),
                "hopper-lists-d128": compiled(gluon_kernel, partial(prefill, True)),
                "hopper-lists-turn-d128": compiled(gluon_kernel, partial(prefill, True, has_turn=True)),
                "hopper-lists-page16-d64": compiled(gluon_kernel, partial(prefill, True, 64, page_size=16)),
                "short-lists-d64": compiled(
                    short_lists._short_list_kernel, lambda: contiguous.attention(q, q, q, block_mask=lists)
                ),
                "tile-rows-d128": compiled(log_sums, lambda: select_by_tile_rows(32, 8, 128, config=portable), choice),
                "tile-rows-turn-d64": compiled(log_sums, lambda: select_by_tile_rows(14, 2, 64, has_turn=True), choice),
                "tile-rows-choice": compiled(choice, lambda: select_by_tile_rows(32, 8, 128), hopper_log_sums_kernel),
                "hopper-tile-rows-d128": compiled(
                    hopper_log_sums_kernel, lambda: select_by_tile_rows(32, 8, 128), choice
                ),
                "hopper-tile-rows-d64": compiled(
                    hopper_log_sums_kernel, lambda: select_by_tile_rows(14, 2, 64), choice
                ),
                "decode-both-pools": compiled(decode._decode_kernel, decode_from_both_pools),
                **{name: compiled(*copy) for name, copy in (page_copies() | selecting() | of_drafts_and_fp8()).items()},
            }
        )
    )


if __name__ == "__main__":
    main()
