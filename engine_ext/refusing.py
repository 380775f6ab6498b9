"""How options are refused: checks of raw values by name, kind and range, and the words of every refusal."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.ranges import Range, ranges_of

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


def check_mapping(path: str, raw: Any) -> None:
    if not isinstance(raw, Mapping):
        refuse(path, raw, "a mapping of option names to values", "Write it as a JSON object")


def check_known(path: str, raw: Mapping[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    for name, value in raw.items():
        if name not in known:
            allowed = f"no option of that name; known here: {', '.join(known) or 'none'}"
            refuse(f"{path}.{name}", value, allowed, suggestion(name, known))


def check_numbers(path: str, options: type[msgspec.Struct], values: Mapping[str, Any]) -> None:
    """Refuse the numbers among the values of a struct's fields that are outside of their ranges, booleans included.

    What is no number at all is left to the decoder, which names the type.
    """
    for name, ranges in ranges_of(options).items():
        value = values.get(name)
        if isinstance(value, int | float) and not any(value in allowed for allowed in ranges):
            allowed = ", or ".join(dict.fromkeys(each.allowed for each in ranges))
            refuse(f"{path}.{name}", value, allowed, f"Use {ranges[0].hint}")


def check_list(path: str, values: Sequence[Any], allowed: Range) -> None:
    """Refuse a list without members, or with one that is out of range."""
    if not values:
        refuse(path, [], "one number for each layer", f"Use {allowed.hint}")
    for place, value in enumerate(values):
        if value not in allowed:
            refuse(f"{path}[{place}]", value, allowed.allowed, f"Use {allowed.hint}")


def describe_type_error(raw: Any, message: str) -> str:
    """Put msgspec's `Expected `float`, got `str` - at `$.prefill.gamma`` into the words of our own refusals."""
    problem, _, location = message.partition(" - at `$")
    names = [name for name in location.rstrip("`").split(".") if name]
    value = raw
    for name in names:
        value = value[name] if isinstance(value, Mapping) and name in value else None
    path = ".".join([ROOT, *names])
    return f"{path}={value!r}; {problem[0].lower()}{problem[1:]}. Give a value of that type."
