"""How vLLM's functions are wrapped."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap_once(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the method `owner.name` by `wrapper(stock)`; doing so again changes nothing.

    owner: a class. The mark is ours and kept on the owner itself: other wrappers of the same method, under or over
    ours, neither hide ours nor pass for it.
    """
    mark = f"_farspan_wraps_{name}"
    if mark in vars(owner):
        return
    stock = getattr(owner, name)
    replacement: Any = functools.wraps(stock)(wrapper(stock))
    if isinstance(inspect.getattr_static(owner, name), classmethod | staticmethod):
        replacement = staticmethod(replacement)
    setattr(owner, name, replacement)
    setattr(owner, mark, True)
