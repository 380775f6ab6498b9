"""Kernel launches that the layers of a step repeat with other tensors.

Triton looks up the compiled kernel again at every launch, from the type, the alignment and the value of each argument:
20 to 30 us of host time for kernels with as many arguments as ours. The layers of a step differ only in their tensors,
so the first layer's launch finds the kernel and the others call it directly.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
"""Bytes; Triton compiles one kernel for pointers at multiples of this and another for the rest."""


@lru_cache
def parameter_names(kernel: Any) -> tuple[str, ...]:
    """The parameters of a function made by `triton.jit`, in order."""
    return tuple(inspect.signature(kernel.fn).parameters)


class RepeatedLaunch:
    """One kernel with its grid and all arguments but the tensors that each layer brings.

    What Triton compiles for is fixed by the first call, so every call must bring tensors of the same dtypes, None at
    the same places, and descriptors of the same blocks. Alignment is checked: unaligned tensors take Triton's own way.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        of_layer: tuple[str, ...],
        arguments: dict[str, Any],
        **options: int,
    ) -> None:
        """Take the arguments of all layers.

        of_layer: names of the parameters that a call brings, in its order; arguments: all the others by name;
        options: of Triton, such as num_warps.
        """
        names = parameter_names(kernel)
        assert set(names) == {*of_layer, *arguments}, set(names) ^ {*of_layer, *arguments}
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.options = options
        self.arguments = [arguments.get(name) for name in names]
        self.places = tuple(names.index(name) for name in of_layer)
        self.compiled: Callable[..., None] | None = None

    def __call__(self, *of_layer: torch.Tensor | TensorDescriptor | float | None) -> None:
        """Launch on the current stream."""
        arguments, is_aligned = self.arguments.copy(), True
        for place, value in zip(self.places, of_layer, strict=True):
            arguments[place] = value
            if isinstance(value, torch.Tensor) and value.data_ptr() % ALIGNMENT:
                is_aligned = False
        if is_aligned and self.compiled is not None:
            self.compiled(*arguments)
            return
        made = self.kernel[self.grid](*arguments, **self.options)
        # Triton's interpreter compiles nothing.
        if is_aligned and isinstance(made, CompiledKernel):
            self.compiled = made[self.grid]
