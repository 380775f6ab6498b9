"""Block masks from files: read, checked against the model, and cut to the heads of each layer and rank."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from farspan.engine_ext.config import ROOT, BlockSparsePrefill
from farspan.engine_ext.errors import ConfigError
from farspan.kernels.block_patterns import check_block_mask, mask_rows
from farspan.kernels.tiles import BlockLists

WHAT_IT_HOLDS = "a boolean array [layers or 1, heads or 1, blocks, blocks]"


def load_mask(file: str) -> np.ndarray:
    """Read a bool mask [layers, heads, blocks, blocks] from .npy or a one-tensor .safetensors.

    What is not asked for of an .npy file stays on disk. Raises ConfigError with the path, whatever is wrong with it.
    """
    option = f"{ROOT}.prefill.mask_file={file!r}"
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"{option} is not there. Name an existing .npy or .safetensors file.")
    try:
        mask = _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error
    except Exception as error:
        # numpy and safetensors raise many kinds for damaged files, some of them plain Exception.
        raise ConfigError(
            f"{option} cannot be read ({type(error).__name__}: {error}); allowed: a {path.suffix} file with "
            f"{WHAT_IT_HOLDS}. Write it anew."
        ) from error
    if mask.dtype != np.bool_ or mask.ndim != 4 or mask.shape[2] != mask.shape[3]:
        raise ConfigError(
            f"{option} holds {mask.dtype} {list(mask.shape)}; allowed: bool [layers or 1, heads or 1, blocks, blocks]. "
            "Convert it."
        )
    return mask


def _read_npy(path: Path) -> np.ndarray:
    if zipfile.is_zipfile(path):
        raise ConfigError("is an archive of arrays (.npz); allowed: one array. Save it by numpy.save.")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _read_safetensors(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    tensors = load_file(path)
    if len(tensors) != 1:
        raise ConfigError(f"holds the tensors {sorted(tensors)}; allowed: exactly one. Remove the others.")
    (mask,) = tensors.values()
    return mask


def check_mask(
    mask: np.ndarray,
    prefill: BlockSparsePrefill,
    *,
    num_layers: int,
    num_q_heads: int,
    num_kv_heads: int,
    max_model_len: int,
) -> None:
    """Raise ConfigError where a mask does not fit a model; the numbers are the whole model's."""
    option = f"{ROOT}.prefill.mask_file={prefill.mask_file!r}"
    layers, heads, blocks = mask.shape[:3]
    if layers not in (1, num_layers):
        raise ConfigError(f"{option} has masks for {layers} layers; allowed: 1 or {num_layers}. Change its shape.")
    if heads not in (1, num_kv_heads, num_q_heads):
        allowed = sorted({num_kv_heads, num_q_heads} - {1})
        raise ConfigError(f"{option} has masks for {heads} heads; allowed: 1 or {allowed}. Change its shape.")
    if blocks * prefill.block_size < max_model_len:
        raise ConfigError(
            f"{option} has {blocks} blocks of {prefill.block_size} tokens and covers prompts of "
            f"{blocks * prefill.block_size} tokens, but max_model_len is {max_model_len}. Give a larger mask or lower "
            "--max-model-len."
        )
    for layer in range(layers):
        try:
            check_block_mask(torch.from_numpy(np.array(mask[layer])))
        except ValueError as error:
            raise ConfigError(f"{option}, layer {layer}: {error}") from error


def heads_of_rank(num_masks: int, *, num_q_heads: int, num_kv_heads: int, tp_rank: int, tp_size: int) -> slice:
    """Which of a layer's masks one tensor-parallel rank uses.

    num_masks: 1, num_kv_heads or num_q_heads of the whole model. Where there are more ranks than KV heads, vLLM
    gives each rank a copy of one of them.
    """
    if num_masks == 1:
        return slice(0, 1)
    if num_masks == num_q_heads or num_kv_heads >= tp_size:
        per_rank = num_masks // tp_size
        return slice(tp_rank * per_rank, (tp_rank + 1) * per_rank)
    head = tp_rank * num_kv_heads // tp_size
    return slice(head, head + 1)


def check_mask_file(prefill: BlockSparsePrefill, model_config: Any, parallel_config: Any) -> None:
    """Read the mask file and hold it against the model. Raises ConfigError with the path."""
    assert prefill.mask_file is not None
    check_mask(
        load_mask(prefill.mask_file),
        prefill,
        num_layers=model_config.get_total_num_hidden_layers(),
        num_q_heads=total_num_q_heads(model_config, parallel_config),
        num_kv_heads=model_config.get_total_num_kv_heads(),
        max_model_len=model_config.max_model_len,
    )


def total_num_q_heads(model_config: Any, parallel_config: Any) -> int:
    return model_config.get_num_attention_heads(parallel_config) * parallel_config.tensor_parallel_size


def mask_rows_of_layer(
    prefill: BlockSparsePrefill, layer_index: int, vllm_config: Any, tp_rank: int, device: torch.device
) -> BlockLists:
    """The mask rows of one layer for the heads of one tensor-parallel rank, on a device."""
    assert prefill.mask_file is not None
    masks = load_mask(prefill.mask_file)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    heads = heads_of_rank(
        masks.shape[1],
        num_q_heads=total_num_q_heads(model, parallel),
        num_kv_heads=model.get_total_num_kv_heads(),
        tp_rank=tp_rank,
        tp_size=parallel.tensor_parallel_size,
    )
    rows = mask_rows(torch.from_numpy(np.array(masks[layer_index if masks.shape[0] > 1 else 0, heads])))
    return BlockLists(rows.block_ids.to(device), rows.block_counts.to(device))
