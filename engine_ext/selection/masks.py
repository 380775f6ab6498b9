"""Block masks in files: read, checked against the model, and cut into what one layer on one rank reads."""

from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from farspan.engine_ext.config import ROOT
from farspan.engine_ext.errors import ConfigError
from farspan.kernels.block_patterns import check_block_mask

MASK = "bool [layers or 1, heads or 1, blocks, blocks]"


def load_mask(file: str) -> np.ndarray:
    """Read a mask [layers or 1, heads or 1, blocks, blocks] of bool from .npy or a one-tensor .safetensors.

    file: `~` stands for the home folder. The array is mapped into memory: what nobody looks at stays on disk.
    Raises ConfigError, which names the file, whatever is wrong with it.
    """
    try:
        path = Path(file).expanduser()
        if not path.is_file():
            refuse_mask(file, "there is no such file", "Name an existing .npy or .safetensors file")
        mask = read_npy(path) if path.suffix == ".npy" else read_safetensors(file, path)
    except ConfigError:
        raise
    # What a damaged file makes its reader raise is anybody's guess: ValueError, OSError, SyntaxError, RuntimeError, ….
    except Exception as error:
        kind = "safetensors" if file.endswith(".safetensors") else "npy"
        refuse_mask(file, f"it cannot be read as {kind} ({error})", "Write it again, with numpy.save or safetensors")
    if mask.dtype != np.bool_ or mask.ndim != 4 or mask.shape[2] != mask.shape[3] or mask.size == 0:
        refuse_mask(file, f"it holds {mask.dtype} {list(mask.shape)}; allowed: {MASK}", "Convert it")
    return mask


def read_npy(path: Path) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="r")


def read_safetensors(file: str, path: Path) -> np.ndarray:
    from safetensors import safe_open

    # The library checks the file, and would then read all of it.
    with safe_open(path, framework="numpy") as tensors:
        names = sorted(tensors.keys())
        if len(names) != 1:
            refuse_mask(file, f"it holds the tensors {names}; allowed: exactly one", "Remove the others")
        dtype, shape = tensors.get_slice(names[0]).get_dtype(), tensors.get_slice(names[0]).get_shape()
    if dtype != "BOOL":
        refuse_mask(file, f"it holds {dtype} {shape}; allowed: {MASK}", "Convert it")
    with path.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    return np.memmap(path, np.bool_, "r", header, tuple(shape))


def check_mask(
    mask: np.ndarray,
    num_layers: int,
    num_q_heads: int,
    num_kv_heads: int,
    max_model_len: int,
    block_size: int,
    path: str,
) -> None:
    """Raise ConfigError unless a mask as `load_mask` returns it fits a whole model; reads all of it, layer by layer.

    num_layers, num_q_heads, num_kv_heads: of the model, not of a rank; max_model_len: tokens.
    block_size: tokens of a mask block; path: the file, for the message.
    """
    layers, heads, blocks, _ = mask.shape
    if layers not in (1, num_layers):
        refuse_mask(path, f"it has masks for {layers} layers; allowed: 1 or {num_layers}", "Change its shape")
    if heads not in (1, num_kv_heads, num_q_heads):
        allowed = " or ".join(str(number) for number in sorted({1, num_kv_heads, num_q_heads}))
        refuse_mask(path, f"it has masks for {heads} heads; allowed: {allowed}", "Change its shape")
    covered = blocks * block_size
    if covered < max_model_len:
        refuse_mask(
            path,
            f"it has {blocks} blocks of {block_size} tokens and covers prompts of {covered} tokens, but max_model_len "
            f"is {max_model_len}",
            "Give a larger mask or lower --max-model-len",
        )
    for layer in range(layers):
        if mask[layer].view(np.uint8).max() > 1:
            refuse_mask(path, f"its layer {layer} holds bytes other than 0 and 1: it is damaged", "Write it again")
        try:
            check_block_mask(torch.from_numpy(np.array(mask[layer])))
        except ValueError as error:
            refuse_mask(path, f"layer {layer}: {error}", "Change the mask")


def mask_of_layer(
    mask: np.ndarray, layer_index: int, num_q_heads_per_rank: int, num_kv_heads_total: int, tp_rank: int, tp_size: int
) -> torch.Tensor:
    """The masks of one layer's heads on one rank: [heads of the rank or 1, blocks, blocks] bool, on the CPU.

    mask: as `check_mask` accepts it. layer_index: of the whole model, 0 at the first stage of a pipeline.
    num_kv_heads_total: of the model. Where tensor parallelism has more ranks than there are KV heads, a rank holds one
    KV head, and neighbouring ranks hold the same.
    """
    layer = mask[layer_index if mask.shape[0] > 1 else 0]
    heads = layer.shape[0]
    if heads == 1:
        first, count = 0, 1
    elif heads == num_q_heads_per_rank * tp_size:
        first, count = tp_rank * num_q_heads_per_rank, num_q_heads_per_rank
    else:
        assert heads == num_kv_heads_total, (heads, num_kv_heads_total)
        first, count = tp_rank * num_kv_heads_total // tp_size, max(num_kv_heads_total // tp_size, 1)
    return torch.from_numpy(np.array(layer[first : first + count]))


def refuse_mask(file: str, problem: str, remedy: str) -> NoReturn:
    raise ConfigError(f"{ROOT}.prefill.mask_file={file!r}: {problem}. {remedy}.")
