"""Run the host's part of flex layers for a Hopper GPU that is not there; prints what it did. Run by `test_host_side`.

Kernels are compiled, and what would be launched is noted. It needs a separate process: the other tests run kernels in
Triton's interpreter.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from farspan.engine_ext import launch, parts
from farspan.engine_ext.config import FlexPrefill, Prefill
from farspan.engine_ext.impl import FarspanImpl
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import LayerContext, StepMetadata
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.kernels import prefill as paged_prefill
from farspan.kernels.batch import PagedBatch
from farspan.kernels.flex import tile_rows
from torch.utils._python_dispatch import TorchDispatchMode
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.compile_for_hopper import AbsentHopper

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 128
CHUNK, KV_LEN = 1024, 2048

launched: list[list[object]] = []


class NotingLauncher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, grid_0: int, grid_1: int, grid_2: int, *others: object) -> None:
        # Before the arguments: the stream, the kernel, what is known of both, and two hooks.
        launched.append([self.name, grid_0, grid_1, grid_2, *map(written, others[6:])])


def written(value: object) -> object:
    """An argument as JSON has it: tensors by their form and values, allocations of the call by their form."""
    if isinstance(value, TensorDescriptor | GluonDescriptor):
        return [written(value.base), *value.shape, *value.strides, *value.block_shape]
    if isinstance(value, torch.Tensor):
        content = value.tolist() if value.dtype == torch.int32 and value.numel() < 64 and value.ndim == 1 else None
        return [*value.shape, *value.stride(), str(value.dtype), addresses.get(value.data_ptr(), content)]
    return value


addresses: dict[int, str] = {}
"""Names of the tensors of the layer that runs."""


class Utils:
    """Takes compiled kernels for loaded."""

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, *_: object) -> None:
        pass


class NotingHopper(AbsentHopper):
    utils = Utils()
    launcher_cls = NotingLauncher


class Operations(TorchDispatchMode):
    """Notes torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Model:
    """Some layers of one step."""

    def __init__(self, prefill: Prefill) -> None:
        self.prefill = prefill
        self.impl: Any = object.__new__(FarspanImpl)
        self.impl.num_heads, self.impl.num_kv_heads, self.impl.scale = NUM_HEADS, NUM_KV_HEADS, 0.1
        self.impl.head_size, self.impl.config = HEAD_DIM, SimpleNamespace(star=None, offload=None)
        self.context = LayerContext(0, None, None, FlexSelector())

    def step(self) -> StepMetadata:
        batch = PagedBatch(
            torch.tensor([0, CHUNK], dtype=torch.int32),
            torch.tensor([KV_LEN], dtype=torch.int32),
            torch.arange(KV_LEN // PAGE_SIZE + 1, dtype=torch.int32)[None],
            max_query_len=CHUNK,
            max_kv_len=KV_LEN,
        )
        maker = PassMaker(NUM_KV_HEADS, "triton", 132, None, False, torch.device("cpu"))
        each = maker.prefill(self.prefill, batch, [0, CHUNK], [KV_LEN], 0, turns=False)
        return StepMetadata((each,), {"layer": self.context})

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """A layer's query, key, value, cache and output."""
        query = torch.empty(CHUNK, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        key = query.new_empty(CHUNK, NUM_KV_HEADS, HEAD_DIM)
        cache = query.new_empty(16, NUM_KV_HEADS, PAGE_SIZE, 2 * HEAD_DIM)
        return query, key, torch.empty_like(key), cache, torch.empty_like(query)

    def layer(self, step: StepMetadata, tensors: tuple[torch.Tensor, ...], slots: torch.Tensor) -> list[list[object]]:
        """Run one layer; returns its launches."""
        query, key, value, cache, out = tensors
        addresses.clear()
        names = ("query", "key", "value", "cache", "out")
        addresses.update((each.data_ptr(), name) for each, name in zip(tensors, names, strict=True))
        addresses[cache.data_ptr() + cache.element_size() * HEAD_DIM] = "values in the cache"
        layer = SimpleNamespace(layer_name="layer")
        launched.clear()
        FarspanImpl.do_kv_cache_update(self.impl, layer, key, value, cache, slots)  # type: ignore[arg-type]
        FarspanImpl.forward(self.impl, layer, query, key, value, cache, step, out)
        return launched.copy()


def report(prefill: Prefill) -> dict[str, object]:
    model, slots = Model(prefill), torch.arange(CHUNK)
    step, other_step = model.step(), model.step()
    first, second = model.tensors(), model.tensors()
    looked_up: list[str] = []
    run = JITFunction.run

    def noting_run(self: Any, *arguments: object, **options: object) -> object:
        looked_up.append(self.fn.__name__)
        return run(self, *arguments, **options)

    JITFunction.run = noting_run
    model.layer(step, first, slots)
    looked_up.clear()
    with Operations() as operations:
        again = model.layer(step, second, slots)
    in_second = looked_up.copy()
    alone = model.layer(other_step, second, slots)
    JITFunction.run = run
    return {
        "kernels": [each[0] for each in again],
        "same_arguments": again == alone,
        "arguments": [len(each) for each in again],
        "looked_up": in_second,
        "operations": operations.names,
    }


def main() -> None:
    triton.runtime.driver.set_active(NotingHopper())
    for module in (paged_prefill, tile_rows):
        module.device_capability = lambda device: (9, 0)
    launch.is_on_host = parts.is_on_host = lambda tensor: False
    json.dump(report(FlexPrefill(min_seq_len=0, min_chunk_len=0)), sys.stdout)


if __name__ == "__main__":
    main()
