"""What numbers an option takes: stated once, at the option's field, and read by its check, its message and its tests.

A field names its ranges in its type: `gamma: Annotated[float, Real(0, 1, least_included=False, hint="0.95")]`.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `least` to `most`, both included."""

    least: int
    most: int
    unit: str
    hint: str
    """What to use, if in doubt."""
    besides: int | None = None
    """One value below `least` that is allowed too."""

    @property
    def interval(self) -> str:
        """As the README's tables have it: `0, or 257 to 16,777,216`."""
        besides = "" if self.besides is None else f"{self.besides:,}, or "
        return f"{besides}{self.least:,} to {self.most:,}"

    @property
    def allowed(self) -> str:
        return f"a whole number of {self.unit}: {self.interval}"

    def __contains__(self, value: Any) -> bool:
        return is_whole(value) and (self.least <= value <= self.most or value == self.besides)


@dataclass(frozen=True)
class OneOf:
    """A few whole numbers."""

    values: tuple[int, ...]
    unit: str
    hint: str

    @property
    def interval(self) -> str:
        return " or ".join(str(value) for value in self.values)

    @property
    def allowed(self) -> str:
        return f"{self.interval} {self.unit}"

    def __contains__(self, value: Any) -> bool:
        return is_whole(value) and value in self.values


@dataclass(frozen=True)
class Real:
    """Numbers from `least` to `most`; each end included unless it says otherwise. NaN is in no range."""

    least: float
    most: float
    hint: str
    least_included: bool = True
    most_included: bool = True
    noun: str = "a number"

    @property
    def interval(self) -> str:
        """As the README's tables have it: `(0, 1]`, a round bracket where the end is left out."""
        return f"{'[' if self.least_included else '('}{self.least}, {self.most}{']' if self.most_included else ')'}"

    @property
    def allowed(self) -> str:
        return f"{self.noun} in {self.interval}"

    def __contains__(self, value: Any) -> bool:
        if not (is_whole(value) or isinstance(value, float)) or not self.least <= value <= self.most:
            return False
        return (self.least_included or value != self.least) and (self.most_included or value != self.most)


Range = Whole | OneOf | Real


def is_whole(value: Any) -> bool:
    """Whether a value is an int; JSON's true and false are no numbers."""
    return isinstance(value, int) and not isinstance(value, bool)


@cache
def ranges_of(options: type[msgspec.Struct]) -> dict[str, tuple[Range, ...]]:
    """By field of a struct: its ranges, of which a value must be in one; fields that hold no numbers are left out."""
    hints = get_type_hints(options, include_extras=True)
    found = {name: tuple(ranges_in(hints[name])) for name in options.__struct_fields__}
    return {name: ranges for name, ranges in found.items() if ranges}


def ranges_in(hint: Any) -> list[Range]:
    """The ranges in a type: those that annotate it, or the members of a union."""
    annotations = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)]
    return annotations or [each for member in get_args(hint) for each in ranges_in(member)]
