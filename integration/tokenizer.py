"""A model's tokenizer, read once a process, for everything that counts or writes tokens outside of an engine."""

from functools import lru_cache
from typing import Any

from farspan.engine_ext.errors import ConfigError

ANY_LENGTH = 10**9
"""Tokens of a text of which a model reads pieces; transformers would warn of texts longer than the model's context."""


@lru_cache
def load_tokenizer(name: str, trust_remote_code: bool = False, remedy: str = "") -> Any:
    """Read the tokenizer of a folder, or of a name on the model hub.

    remedy: another way out, for the sentence of the ConfigError where there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={name!r} has no tokenizer that can be read ({' '.join(str(error).split())}). Give a folder or a "
            f"name with one{remedy}."
        ) from error
    tokenizer.model_max_length = ANY_LENGTH
    return tokenizer
