"""The tables of docs/options.md, from the option structs: `python -m tools.options_page`; `--write` puts them there.

An option's row is its field: the default and the type as they are, what it does and, after "Cost:", what it takes from
the string below the field.
"""

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from farspan.engine_ext import config as config_module
from farspan.engine_ext.config import (
    PATTERN_OPTIONS,
    PREFILL_METHODS,
    FarspanConfig,
    OffloadOptions,
    Options,
    SelectColdDecode,
    StarOptions,
    StringOptions,
)
from farspan.engine_ext.presets import EXCLUDED, PRESETS
from farspan.engine_ext.ranges import ranges_of

from tools.regions import Region

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = Region(
    ROOT / "docs" / "options.md", "<!-- options: python -m tools.options_page -->\n", "<!-- end of options -->\n"
)
SECTIONS: list[tuple[str, str, type[Options]]] = [
    ("Everything", "", FarspanConfig),
    *((f"`prefill.method: {json.dumps(name)}`", "prefill.", struct) for name, struct in PREFILL_METHODS.items()),
    ("`string`", "string.", StringOptions),
    ("`offload`", "offload.", OffloadOptions),
    ('`offload.cold_decode.method: "select"`', "offload.cold_decode.", SelectColdDecode),
    ("`star`", "star.", StarOptions),
]
"""Heading, path of the options, struct."""


def field_texts(struct: type[Options]) -> dict[str, str]:
    """By field of a struct: the string that stands below it in the source, on one line; "" where there is none.

    None is what users write as null.
    """
    tree = ast.parse(Path(str(config_module.__file__)).read_text())
    (node,) = (each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == struct.__name__)
    texts = {}
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            text = str(below.value.value) if is_text else ""  # type: ignore[union-attr]
            texts[field.target.id] = re.sub(r"\bNone\b", "null", " ".join(text.split()))
    return texts


def allowed_values(struct: type[Options], name: str) -> str:
    """What a field takes, from its type."""
    found = [each.interval for each in ranges_of(struct).get(name, ())]
    hint = get_type_hints(struct)[name]
    members = get_args(hint) if get_origin(hint) not in (Literal, None) else (hint,)
    for member in members:
        if get_origin(member) is Literal:
            found += [f"`{json.dumps(value)}`" for value in get_args(member)]
        elif member is bool:
            found += ["`true`", "`false`"]
        elif member is str:
            found.append("a text")
        elif get_origin(member) is tuple:
            found.append("or a list of such numbers")
        elif isinstance(member, type) and issubclass(member, msgspec.Struct):
            found.append("options, see below")
        elif member is type(None):
            found.append("`null`")
    return ", ".join(dict.fromkeys(found))


def rows_of(prefix: str, struct: type[Options]) -> list[str]:
    """One line of the table for each field."""
    texts, rows = field_texts(struct), []
    for field in msgspec.structs.fields(struct):
        effect, _, cost = texts[field.name].partition("Cost: ")
        default: Any = field.default
        if default is msgspec.NODEFAULT:
            default = {"method": type(field.default_factory()).__struct_config__.tag}
        default = json.dumps(default)
        cells = [f"`{prefix}{field.name}`", f"`{default}`", allowed_values(struct, field.name), effect, cost]
        rows.append("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |")
    return rows


def section(heading: str, prefix: str, struct: type[Options]) -> str:
    """A heading, what the struct is, and the table of its fields."""
    about = " ".join((struct.__doc__ or "").split())
    rows = rows_of(prefix, struct)
    table = ["| option | default | allowed | effect | cost |", "| --- | --- | --- | --- | --- |", *rows] if rows else []
    return "\n".join([f"### {heading}", "", about, *([""] if table else []), *table, ""])


def preset_table() -> str:
    """What each preset stands for, and what it rules out."""
    rows = ["| preset | stands for | rules out |", "| --- | --- | --- |"]
    for name, options in PRESETS.items():
        excluded = ", ".join(f"`{section}`" for section in EXCLUDED.get(name, {}))
        rows.append(f"| `{json.dumps(name)}` | `{json.dumps(options)}` | {excluded} |")
    return "\n".join(["### Presets", "", *rows, ""])


def pattern_table() -> str:
    """The options that each pattern of block_sparse reads."""
    rows = ["| pattern | reads |", "| --- | --- |"]
    for name, options in PATTERN_OPTIONS.items():
        read = ["block_size", *sorted(options)]
        rows.append(f"| `{name}` | {', '.join(f'`{each}`' for each in read)} |")
    return "\n".join(["### Patterns", "", *rows, ""])


def options_page() -> str:
    """The generated part of docs/options.md."""
    return "\n".join([preset_table(), *(section(*each) for each in SECTIONS), pattern_table()])


if __name__ == "__main__":
    sys.exit(OPTIONS.serve("python -m tools.options_page", options_page))
