"""Which kernel computes what, by device: the CPU platform's PyTorch path, or Triton and FlashAttention 3 on CUDA."""

from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from farspan.engine_ext.config import FarspanConfig
from farspan.engine_ext.errors import ConfigError
from farspan.kernels.cpu_attention import cpu_attention, write_kv_cpu
from farspan.kernels.decode import DecodeWorkspace, choose_num_splits, decode_workspace, paged_decode
from farspan.kernels.kv_write import write_kv
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.rotary_turn import RotaryShift
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
        lse: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> None:
        """Causal attention of a group's chunks over their whole prefixes, or over the blocks listed.

        lse: [num_q_heads, num_tokens] float32, natural log, where it is wanted; only of a group with tiles.
        head_mask: [num_q_heads, num_requests] bool, on the device: the heads of each request to compute, all when None.
            `out` and `lse` of the others stay as they are. Only without block lists, of a group with tiles.
        """
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
        lse: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> None:
        cpu_attention(
            query,
            kv_cache,
            group.block_table,
            group.seq_lens,
            group.query_start_loc,
            scale,
            out=out,
            lse=lse,
            tiles=group.tiles,
            block_lists=block_lists,
            head_mask=head_mask,
            string=string,
        )


class CudaLauncher:
    """Triton kernels, and FlashAttention 3 for dense prefill where it is chosen."""

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        write_kv(key, value, kv_cache, slot_mapping)

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
        paged_decode(
            query,
            kv_cache,
            step.block_table[:n],
            step.seq_lens[:n],
            scale,
            num_splits=step.num_splits,
            string=string,
            out=out,
            workspace=step.decode_workspace,
        )

    def prefill(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        group: "PrefillGroup",
        block_lists: BlockLists | None,
        scale: float,
        string: RotaryShift | None,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        head_mask: torch.Tensor | None = None,
    ) -> None:
        if group.tiles is None:
            assert block_lists is None
            assert head_mask is None
            assert string is None
            prefill_fa3(query, kv_cache, group, scale, out)
            return
        paged_prefill(
            query,
            kv_cache,
            group.block_table,
            group.seq_lens,
            group.query_start_loc,
            group.tiles,
            scale,
            block_lists=block_lists,
            head_mask=head_mask,
            string=string,
            max_query_len=group.max_query_len,
            out=out,
            lse=lse,
        )


def prefill_fa3(
    query: torch.Tensor, kv_cache: torch.Tensor, group: "PrefillGroup", scale: float, out: torch.Tensor
) -> None:
    """Dense causal prefill by vLLM's FlashAttention 3; arguments as in `Launcher.prefill`."""
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    # It wants [num_pages, page_size, num_kv_heads, head_dim]; the copy engine rejects the odd strides that torch gives
    # to dimensions of size 1.
    key, value = kv_cache.transpose(1, 2).split(query.shape[-1], dim=-1)
    flash_attn_varlen_func(
        q=query,
        k=canonicalize_singleton_dim_strides(key),
        v=canonicalize_singleton_dim_strides(value),
        out=out,
        cu_seqlens_q=group.query_start_loc,
        max_seqlen_q=group.max_query_len,
        seqused_k=group.seq_lens,
        max_seqlen_k=group.max_seq_len,
        softmax_scale=scale,
        causal=True,
        block_table=group.block_table,
        fa_version=3,
    )


def make_launcher(config: FarspanConfig, device: torch.device, head_size: int, dtype: torch.dtype) -> Launcher:
    """The kernels of a device. Raises ConfigError where the `kernel` option cannot be honoured there."""
    return CpuLauncher() if choose_dense_kernel(config, device, head_size, dtype) == "cpu" else CudaLauncher()


def choose_dense_kernel(config: FarspanConfig, device: torch.device, head_size: int, dtype: torch.dtype) -> DenseKernel:
    """Which kernel computes dense prefill at ordinary positions. Raises ConfigError where `kernel` cannot be honoured.

    Shifted positions are always computed by "triton", or by "cpu" there.
    """
    if device.type == "cpu":
        if config.kernel != "auto":
            raise ConfigError(
                f"kernel={config.kernel!r}; on the CPU platform attention is computed in PyTorch, allowed: 'auto'. "
                "Leave kernel out."
            )
        return "cpu"
    if config.kernel == "triton":
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


class DecodePlanner:
    """Numbers of splits, and the one workspace that captured graphs and eager steps share."""

    def __init__(
        self,
        max_num_reqs: int,
        max_seq_len: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> None:
        """max_num_reqs: of any step; max_seq_len: tokens of any request, both upper bounds."""
        self.num_kv_heads = num_kv_heads
        self.workspace: DecodeWorkspace | None = None
        self.num_sms = 0
        if device.type != "cpu":
            self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
            self.workspace = decode_workspace(
                max_num_reqs, num_q_heads, num_kv_heads, head_dim, max_seq_len, self.num_sms, device
            )

    def num_splits(self, num_reqs: int, max_seq_len: int) -> int:
        """Parts to cut each KV sequence into; 1 on the CPU."""
        if self.workspace is None or num_reqs == 0:
            return 1
        return choose_num_splits(num_reqs, self.num_kv_heads, max_seq_len, self.num_sms)
