"""Mask files: which are refused, with a sentence that names the file, and the masks that a layer on a rank gets."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from farspan.engine_ext.config import ROOT
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.selection.masks import check_mask, load_mask, mask_of_layer
from safetensors.numpy import save_file

# Two layers, four query heads on two KV heads, 512 tokens in blocks of 128.
MODEL: dict[str, Any] = {
    "num_layers": 2,
    "num_q_heads": 4,
    "num_kv_heads": 2,
    "max_model_len": 512,
    "block_size": 128,
    "path": "m.npy",
}


def full(layers: int = 1, heads: int = 1, blocks: int = 4) -> np.ndarray:
    return np.ones((layers, heads, blocks, blocks), dtype=bool)


def saved(path: Path, mask: np.ndarray) -> bytes:
    if path.suffix == ".npy":
        np.save(path, mask)
    else:
        save_file({"mask": mask}, path)
    return path.read_bytes()


def write_objects(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, mask=full())


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(saved(path, full())[:-5]),
    "header-only": lambda path: path.write_bytes(saved(path, full())[:9]),
    "corrupt-header": lambda path: path.write_bytes(saved(path, full()).replace(b"{", b"[", 1)),
    "text": lambda path: path.write_text("1 1 1\n1 1 1\n"),
    "raw-pickle": lambda path: path.write_bytes(pickle.dumps(full())),
    "object-array": write_objects,
    "torch": lambda path: torch.save(torch.ones(1, 1, 4, 4, dtype=torch.bool), path),
    "npz": write_npz,
    "other-kind": lambda path: path.write_bytes(
        saved(path.with_suffix(".safetensors" if path.suffix == ".npy" else ".npy"), full())
    ),
    "no-element": lambda path: saved(path, full(blocks=0)),
}


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_in_one_sentence_with_the_path(tmp_path: Path, damage: str, suffix: str) -> None:
    path = tmp_path / f"mask{suffix}"
    DAMAGES[damage](path)
    with pytest.raises(ConfigError) as caught:
        load_mask(str(path))
    text = str(caught.value)
    assert text.startswith(f"{ROOT}.prefill.mask_file={str(path)!r}: it ")
    assert text.endswith(("Write it again, with numpy.save or safetensors.", "Convert it."))


@pytest.mark.parametrize("name", ["nowhere.npy", "~/no/such/mask.npy", "~no-such-user/mask.npy", "folder.npy"])
def test_missing_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.npy").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"mask_file='{name}': (there is no such file|it cannot be read)"):
        load_mask(name)


@pytest.mark.parametrize("name", ["mask.npy", "mask.safetensors"])
def test_the_home_folder_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tmp_path / name, full(layers=2))
    assert np.array_equal(load_mask(f"~/{name}"), full(layers=2))


@pytest.mark.parametrize("name", ["mask.npy", "mask.safetensors"])
def test_masks_stay_on_disk(name: str, tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((2, 3, 5, 5)) < 0.5
    saved(tmp_path / name, mask)
    mapped = load_mask(str(tmp_path / name))
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, mask)


def test_two_tensors(tmp_path: Path) -> None:
    save_file({"a": full(), "b": full()}, tmp_path / "mask.safetensors")
    with pytest.raises(ConfigError, match=r"it holds the tensors \['a', 'b'\]; allowed: exactly one"):
        load_mask(str(tmp_path / "mask.safetensors"))


def test_a_dtype_that_numpy_does_not_have(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"mask": torch.ones(1, 1, 4, 4, dtype=torch.bfloat16)}, tmp_path / "mask.safetensors")
    with pytest.raises(ConfigError, match=r"it holds BF16 \[1, 1, 4, 4\]; allowed: bool"):
        load_mask(str(tmp_path / "mask.safetensors"))


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (full().astype(np.int8), "it holds int8 [1, 1, 4, 4]; allowed: bool"),
        (full()[0], "it holds bool [1, 4, 4]; allowed: bool"),
        (full()[:, :, :3], "it holds bool [1, 1, 3, 4]; allowed: bool"),
    ],
    ids=["dtype", "axes", "not-square"],
)
def test_arrays_that_are_no_masks(tmp_path: Path, mask: np.ndarray, sentence: str) -> None:
    saved(tmp_path / "mask.npy", mask)
    with pytest.raises(ConfigError) as caught:
        load_mask(str(tmp_path / "mask.npy"))
    assert sentence in str(caught.value)


def blind() -> np.ndarray:
    mask = full(layers=2)
    mask[1, 0, 2, 2] = False
    return mask


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (full(layers=3), "it has masks for 3 layers; allowed: 1 or 2. Change its shape."),
        (full(heads=3), "it has masks for 3 heads; allowed: 1 or 2 or 4. Change its shape."),
        (full(blocks=3), "covers prompts of 384 tokens, but max_model_len is 512. Give a larger mask"),
        (blind(), "layer 1: block mask: head 0, query block 2 does not see its own block"),
        (np.full((1, 1, 4, 4), 3, dtype=np.uint8).view(bool), "its layer 0 holds bytes other than 0 and 1"),
    ],
    ids=["more-layers", "heads", "too-small", "blind-query", "damaged"],
)
def test_masks_that_do_not_fit_the_model(mask: np.ndarray, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mask(mask, **MODEL)
    assert str(caught.value).startswith(f"{ROOT}.prefill.mask_file='m.npy': ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_masks_that_fit(layers: int, heads: int) -> None:
    check_mask(full(layers, heads), **MODEL)
    check_mask(full(layers, heads, blocks=9), **MODEL)


def numbered(layers: int, heads: int) -> np.ndarray:
    """A mask whose first row encodes its layer and head as a binary number."""
    numbers = np.arange(layers * heads).reshape(layers, heads, 1, 1)
    return np.broadcast_to(numbers >> np.arange(8) & 1, (layers, heads, 8, 8)).astype(bool)


def numbers_of(masks: torch.Tensor) -> list[int]:
    return (masks[:, 0] * (1 << torch.arange(8))).sum(dim=1).tolist()


@pytest.mark.parametrize(
    ("heads", "tp_size", "expected"),
    [
        (1, 4, [[1], [1], [1], [1]]),
        (8, 1, [[8, 9, 10, 11, 12, 13, 14, 15]]),
        (8, 2, [[8, 9, 10, 11], [12, 13, 14, 15]]),
        (2, 1, [[2, 3]]),
        (2, 2, [[2], [3]]),
        (2, 4, [[2], [2], [3], [3]]),
        (2, 8, [[2], [2], [2], [2], [3], [3], [3], [3]]),
    ],
    ids=["one", "q-tp1", "q-tp2", "kv-tp1", "kv-tp2", "kv-replicated-twice", "kv-replicated-four-times"],
)
def test_mask_of_layer_and_rank(heads: int, tp_size: int, expected: list[list[int]]) -> None:
    mask = numbered(layers=2, heads=heads)
    found = [mask_of_layer(mask, 1, 8 // tp_size, 2, rank, tp_size) for rank in range(tp_size)]
    assert [numbers_of(each) for each in found] == expected


def test_one_mask_serves_all_layers() -> None:
    mask = numbered(layers=1, heads=2)
    assert torch.equal(mask_of_layer(mask, 7, 4, 2, 0, 1), torch.from_numpy(mask[0]))
