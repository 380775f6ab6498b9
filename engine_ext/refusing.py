"""The words in which options are refused: the value, what is allowed, what to do."""

import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from farspan.engine_ext.errors import ConfigError

ROOT = 'additional_config["farspan"]'


def refuse(path: str, value: Any, allowed: str, remedy: str) -> NoReturn:
    """Raise the ConfigError of one option."""
    raise ConfigError(
        f"{path}={value!r}; allowed: {allowed}. {remedy if remedy.endswith(('.', '?')) else remedy + '.'}"
    )


def one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(repr(name) for name in names)


def suggestion(name: Any, known: Iterable[str]) -> str:
    """What to do about an unknown name: the nearest known one, or else its removal."""
    near = difflib.get_close_matches(str(name), tuple(known), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else "Take one of those, or leave it out."
