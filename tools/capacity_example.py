"""The example in docs/capacity.md: `python -m tools.capacity_example` prints it, `--write` puts it there."""

import contextlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.regions import Region

EXAMPLE = Region(
    Path(__file__).resolve().parent.parent / "docs" / "capacity.md",
    "<!-- example: python -m tools.capacity_example -->\n",
    "<!-- end of example -->\n",
)
MODEL = "llama-8b"
ARGUMENTS = (
    f"plan {MODEL} --gpu-memory 24GB --host-memory 200 --hf-overrides '{{\"max_position_embeddings\": 1048576}}'"
)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""The shape of Llama 3 8B."""


def example_output() -> str:
    """The command and what it prints, as Markdown."""
    from farspan.cli import main

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, MODEL)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        output = io.StringIO()
        with contextlib.chdir(parent), contextlib.redirect_stdout(output):
            assert main(shlex.split(ARGUMENTS)) == 0
    return f"```\n$ farspan {ARGUMENTS}\n{output.getvalue()}```\n"


def main() -> int:
    return EXAMPLE.serve("python -m tools.capacity_example", example_output)


if __name__ == "__main__":
    sys.exit(main())
