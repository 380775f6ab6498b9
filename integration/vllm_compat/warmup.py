"""Our warm-up as one kernel of vLLM's own: run before graphs are captured, with vLLM's progress bar and switch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from farspan.engine_ext.warmup import WarmUp, WarmUpCase, warm_ups_of
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry, VllmJitKernel


@dataclass(frozen=True)
class LayerCase:
    """A case on some heads of a layer."""

    layer_name: str
    first_kv_head: int
    case: WarmUpCase


class FarspanAttention(VllmJitKernel[LayerCase]):
    """The kernels of a model runner's attention. vLLM's progress bar shows this name.

    vLLM sets up KV caches more than once, the first time only to measure memory: so the layers and their pages are
    looked up when the warm-up runs.
    """

    CompileKey = LayerCase

    def __init__(self, runner: Any, metadata_builders: Callable[[Any], list[Any]]) -> None:
        super().__init__()
        self.runner = runner
        self.metadata_builders = metadata_builders

    def warm_ups(self) -> dict[tuple[str, int], WarmUp]:
        """By layer and first KV head: per metadata builder one layer of those whose turns compile the same kernels."""
        modules = self.runner.vllm_config.compilation_config.static_forward_context
        found = {}
        for builder in self.metadata_builders(self.runner):
            kinds = set()
            for name, context in builder.layers.items():
                turn = context.turn
                kind = None if turn is None else (tuple(turn.cos.shape), turn.is_neox, turn.slope)
                if kind in kinds:
                    continue
                kinds.add(kind)
                layer = modules[name]
                for each in warm_ups_of(builder, name, layer.kv_cache, layer.num_heads, self.runner.dtype):
                    found[name, each.view.first_kv_head] = each
        return found

    def get_warmup_keys(self) -> list[LayerCase]:
        """See `VllmJitKernel`."""
        return [LayerCase(*key, case) for key, warm_up in self.warm_ups().items() for case in warm_up.cases()]

    def compile(self, compile_key: LayerCase) -> None:
        """See `VllmJitKernel`."""
        self.warm_ups()[compile_key.layer_name, compile_key.first_kv_head].run(compile_key.case)


def register_warm_up(runner: Any, metadata_builders: Callable[[Any], list[Any]]) -> None:
    """Have vLLM warm up our kernels where its `enable_jit_warmup` says so.

    runner: a model runner on a GPU, registered once; metadata_builders: gives the builders of farspan that it has made.
    """
    with runner.jit_warmup_registry.activate():
        JitWarmupRegistry.register(FarspanAttention(runner, metadata_builders))
