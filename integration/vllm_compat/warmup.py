"""Our warm-up as one kernel of vLLM's own: run before graphs are captured, with vLLM's progress bar and switch."""

from dataclasses import dataclass
from typing import Any

from farspan.engine_ext.warmup import WarmUp, WarmUpCase
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry, VllmJitKernel


@dataclass(frozen=True)
class LayerCase:
    """A case on one layer."""

    layer_name: str
    case: WarmUpCase


class FarspanAttention(VllmJitKernel[LayerCase]):
    """The kernels of a model runner's attention. vLLM's progress bar shows this name.

    vLLM sets up KV caches more than once, the first time only to measure memory: so the layers and their pages are
    looked up when the warm-up runs.
    """

    CompileKey = LayerCase

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.runner = runner

    def warm_ups(self) -> dict[str, WarmUp]:
        """By layer name: per metadata builder one layer of those whose turns compile the same kernels."""
        from farspan.vllm_compat.runner import metadata_builders

        modules = self.runner.vllm_config.compilation_config.static_forward_context
        found = {}
        for builder in metadata_builders(self.runner):
            kinds = set()
            for name, context in builder.layers.items():
                turn = context.turn
                kind = None if turn is None else (tuple(turn.cos.shape), turn.is_neox, turn.slope)
                if kind not in kinds:
                    kinds.add(kind)
                    layer = modules[name]
                    found[name] = WarmUp(builder, layer.kv_cache, context, layer.num_heads, self.runner.dtype)
        return found

    def get_warmup_keys(self) -> list[LayerCase]:
        """See `VllmJitKernel`."""
        return [LayerCase(name, case) for name, warm_up in self.warm_ups().items() for case in warm_up.cases()]

    def compile(self, compile_key: LayerCase) -> None:
        """See `VllmJitKernel`."""
        self.warm_ups()[compile_key.layer_name].run(compile_key.case)


def register_warm_up(runner: Any) -> None:
    """Have vLLM warm up our kernels where its `enable_jit_warmup` says so; runner: of a GPU, made once."""
    with runner.jit_warmup_registry.activate():
        JitWarmupRegistry.register(FarspanAttention(runner))
