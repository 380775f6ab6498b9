"""The small bundled retrieval model, its tokenizer and its task generator."""

import functools
import hashlib
import lzma
import os
import shutil
import tempfile
from pathlib import Path

from farspan.engine_ext.errors import ConfigError

BUNDLE = Path(__file__).parent / "model"
PACKED_SUFFIX = ".xz"


@functools.cache
def model_dir() -> Path:
    """Folder of the bundled model, unpacked at first use: give it to vLLM or transformers as the model's name.

    It is under `$XDG_CACHE_HOME/farspan`, or `~/.cache/farspan`. Raises ConfigError where that cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "farspan")
    content = hashlib.sha256()
    for path in sorted(BUNDLE.iterdir()):
        content.update(path.name.encode() + path.read_bytes())
    try:
        return unpack(BUNDLE, cache.expanduser() / f"needle-{content.hexdigest()[:12]}")
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise ConfigError(
            f"The bundled model cannot be unpacked in {cache} ({getattr(error, 'strerror', None) or error}). Set "
            "XDG_CACHE_HOME to a folder with 8 MB to write."
        ) from error


def local_name(model: str) -> str:
    """What vLLM and transformers call a model on this machine: the bundled one's folder for "needle", else `model`."""
    return str(model_dir()) if model == "needle" else model


def unpack(bundle: Path, folder: Path) -> Path:
    """Copy a folder, its .xz files unpacked. The copy appears whole or not at all, whoever else makes it too."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        for path in bundle.iterdir():
            if path.suffix == PACKED_SUFFIX:
                (made / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
            else:
                shutil.copy(path, made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder
