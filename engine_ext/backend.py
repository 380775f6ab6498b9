"""The backend that vLLM asks: what it supports, and why it refuses."""

from typing import Any, ClassVar

import torch
from farspan.engine_ext import support
from farspan.engine_ext.errors import UnsupportedModelError
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout


class FarspanBackend(AttentionBackend):
    """vLLM's backend CUSTOM. All attention of ordinary GQA decoders; everything else is refused with a sentence."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(support.DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        *support.KV_CACHE_DTYPES,
        *support.FP8_KV_CACHE_DTYPES,
    ]
    forward_includes_kv_cache_update: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse the backends that vLLM derives for layers of special kinds: their builders rewrite our batches.

        Raises UnsupportedModelError.
        """
        super().__init_subclass__(**kwargs)
        if "get_builder_cls" in vars(cls):
            raise UnsupportedModelError(
                f"{cls.__name__}: a layer that reads other keys than all those before it (chunked local, cross or "
                f"encoder attention); farspan supports decoders with plain GQA. {support.ELSEWHERE}."
            )

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        from farspan.engine_ext.impl import FarspanImpl

        return FarspanImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        from farspan.engine_ext.metadata import FarspanMetadataBuilder

        return FarspanMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(support.HEAD_SIZES)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return list(support.PAGE_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens of a page where the user names none: one selected block is then one box for the copy engine."""
        return support.PREFERRED_PAGE_SIZE

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """capability: vLLM's, of the GPU; None on the CPU platform."""
        return support.capability_refusal(capability) is None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The layer's KV cache spec as it is. Raises UnsupportedModelError where keys and values differ in size."""
        reason = support.head_size_refusal(spec.head_size, getattr(spec, "head_size_v", None))
        if reason is not None:
            raise UnsupportedModelError(reason)
        return spec

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """One head's page contiguous."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """Sentences for what the `supports_*` methods can only refuse without a reason; None if all is well."""
        reasons = [
            support.head_size_refusal(head_size),
            support.dtype_refusal(dtype),
            support.kv_cache_dtype_refusal(kv_cache_dtype, dtype, device_capability),
            support.block_size_refusal(block_size),
            support.capability_refusal(device_capability),
        ]
        if use_mla:
            reasons.append(f"multi-head latent attention; farspan supports plain GQA. {support.ELSEWHERE}.")
        if has_sink:
            reasons.append(f"attention sinks; farspan supports plain softmax only. {support.ELSEWHERE}.")
        sentences = [reason for reason in reasons if reason is not None]
        return " ".join(sentences) or None
