"""docs/options.md is what the structs say, and leaves nothing out."""

import msgspec
from farspan.engine_ext.config import PREFILL_METHODS, FarspanConfig

from tools.options_page import OPTIONS, SECTIONS, allowed_values, field_texts, options_page


def test_the_page_is_current() -> None:
    assert OPTIONS.is_current(options_page()), "run: python -m tools.options_page --write"


def test_every_option_has_a_row_and_says_what_it_does() -> None:
    page = options_page()
    assert {struct for _, _, struct in SECTIONS} >= {FarspanConfig, *PREFILL_METHODS.values()}
    for _, prefix, struct in SECTIONS:
        texts = field_texts(struct)
        for field in msgspec.structs.fields(struct):
            assert texts[field.name].partition("Cost: ")[0], f"{prefix}{field.name}: no string below the field"
            assert page.count(f"\n| `{prefix}{field.name}` |") == 1
            assert allowed_values(struct, field.name), field.name
