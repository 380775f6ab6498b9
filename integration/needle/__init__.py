"""The small bundled retrieval model, its tokenizer and its task generator."""

from pathlib import Path


def model_dir() -> Path:
    """Folder of the bundled model: give it to vLLM or transformers as the model's name."""
    return Path(__file__).parent / "model"
