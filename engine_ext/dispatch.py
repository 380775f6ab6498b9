"""Which kernel computes what, by device: the CPU platform's PyTorch path, or Triton and FlashAttention 3 on CUDA."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from farspan.engine_ext.config import FarspanConfig
from farspan.engine_ext.errors import ConfigError
from farspan.kernels.cpu_attention import cpu_attention, write_kv_cpu
from farspan.kernels.rope_shift import RotaryShift
from farspan.kernels.tiles import BlockLists

if TYPE_CHECKING:
    from farspan.engine_ext.metadata import PrefillGroup, StepMetadata

DenseKernel = Literal["cpu", "triton", "fa3"]
FA3_MAX_HEAD_SIZE = 256
FA3_DTYPES = (torch.float16, torch.bfloat16)


class Launcher(Protocol):
    """The kernels of one device. Every method writes its result in place.

    query, out: [num_tokens, num_q_heads, head_dim]; kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim].
    string: the shifted rotary positions, or None.
    """

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store [num_tokens, num_kv_heads, head_dim] keys and values; slot -1 is skipped."""
        ...

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: "StepMetadata",
        scale: float,
        string: RotaryShift | None,
        out: torch.Tensor,
    ) -> None:
        """Attention of the step's decoding requests, one query token each."""
        ...

    def prefill(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        group: "PrefillGroup",
        block_lists: BlockLists | None,
        scale: float,
        string: RotaryShift | None,
        out: torch.Tensor,
    ) -> None:
        """Causal attention of a group's chunks over their whole prefixes, or over the blocks listed."""
        ...


class CpuLauncher:
    """PyTorch on the host."""

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        write_kv_cpu(key, value, kv_cache, slot_mapping)

    def decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: "StepMetadata",
        scale: float,
        string: RotaryShift | None,
        out: torch.Tensor,
    ) -> None:
        n = step.num_decodes
        starts = step.query_start_loc[: n + 1]
        cpu_attention(query, kv_cache, step.block_table, step.seq_lens[:n], starts, scale, out=out, string=string)

    def prefill(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        group: "PrefillGroup",
        block_lists: BlockLists | None,
        scale: float,
        string: RotaryShift | None,
        out: torch.Tensor,
    ) -> None:
        cpu_attention(
            query,
            kv_cache,
            group.block_table,
            group.seq_lens,
            group.query_start_loc,
            scale,
            out=out,
            tiles=group.tiles,
            block_lists=block_lists,
            string=string,
        )


def make_launcher(config: FarspanConfig, device: torch.device, head_size: int, dtype: torch.dtype) -> Launcher:
    """The kernels of a device. Raises ConfigError where the `kernel` option cannot be honoured there."""
    if choose_dense_kernel(config, device, head_size, dtype) == "cpu":
        return CpuLauncher()
    raise NotImplementedError


def choose_dense_kernel(config: FarspanConfig, device: torch.device, head_size: int, dtype: torch.dtype) -> DenseKernel:
    """Which kernel computes dense prefill. Raises ConfigError where the `kernel` option cannot be honoured."""
    if device.type == "cpu":
        if config.kernel != "auto":
            raise ConfigError(
                f"kernel={config.kernel!r}; on the CPU platform attention is computed in PyTorch, allowed: 'auto'. "
                "Leave kernel out."
            )
        return "cpu"
    if config.kernel == "triton" or config.string is not None:
        return "triton"
    reason = fa3_refusal(head_size, dtype)
    if reason is None:
        return "fa3"
    if config.kernel == "fa3":
        raise ConfigError(f"kernel='fa3'; {reason}. Use 'auto' or 'triton'.")
    return "triton"


@cache
def fa3_refusal(head_size: int, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 3 cannot serve these layers on this GPU, or None if it can."""
    if head_size > FA3_MAX_HEAD_SIZE:
        return f"FlashAttention 3 supports head sizes up to {FA3_MAX_HEAD_SIZE}, not {head_size}"
    if dtype not in FA3_DTYPES:
        return f"FlashAttention 3 supports float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except ImportError as error:
        return f"this vLLM has no FlashAttention ({error})"
    return None if is_fa_version_supported(3) else "FlashAttention 3 needs an NVIDIA Hopper GPU and vLLM's build of it"


def make_split_chooser(num_kv_heads: int, device: torch.device) -> Callable[[int, int], int]:
    """A function from (number of decoding requests, longest sequence) to the number of splits on this device."""
    if device.type == "cpu":
        return lambda num_requests, max_seq_len: 1
    raise NotImplementedError
