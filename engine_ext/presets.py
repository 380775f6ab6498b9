"""Presets: names for whole option trees, which explicit options refine and may not contradict."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from farspan.engine_ext.refusing import ROOT, one_of, refuse, suggestion

Preset = Literal["exact", "balanced", "fast", "max-context"]

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "exact": {"prefill": {"method": "dense"}},
    "balanced": {"prefill": {"method": "flex", "gamma": 0.95}},
    "fast": {"prefill": {"method": "flex", "gamma": 0.9}},
    "max-context": {"prefill": {"method": "dense"}, "offload": {}},
}
"""What each preset stands for."""
EXCLUDED: dict[str, dict[str, str]] = {
    "exact": {"string": "shifted positions change what attention computes"},
}
"""By preset: sections that it rules out, and why."""


def expand_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The options as they would stand without `preset`: the preset's, with the explicit ones in their place.

    raw: the option tree, which stays as it is. Raises ConfigError for an unknown preset, and for options that
    contradict it: another method, a section of the preset switched off, a section that it rules out.
    """
    expanded = {name: value for name, value in raw.items() if name != "preset"}
    preset = raw.get("preset")
    if preset is None:
        return expanded
    if not isinstance(preset, str) or preset not in PRESETS:
        refuse(f"{ROOT}.preset", preset, one_of(get_args(Preset)), suggestion(preset, get_args(Preset)))
    for section, reason in EXCLUDED.get(preset, {}).items():
        if expanded.get(section) is not None:
            refuse(
                f"{ROOT}.{section}",
                expanded[section],
                f"without preset {preset!r}: {reason}",
                f"Leave out {section} or preset",
            )
    for section, options in PRESETS[preset].items():
        explicit = expanded.get(section, {})
        if explicit is None:
            refuse(
                f"{ROOT}.{section}",
                None,
                f"options, or nothing, with preset {preset!r}, which switches {section} on",
                f"Leave out {section} or preset",
            )
        if isinstance(explicit, Mapping):  # else its own check refuses it
            check_method(preset, f"{ROOT}.{section}", options, explicit)
            expanded[section] = {**options, **explicit}
    return expanded


def check_method(preset: str, path: str, options: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
    """Refuse a method of prefill that is not the preset's. Raises ConfigError."""
    if "method" in options and explicit.get("method", options["method"]) != options["method"]:
        refuse(
            f"{path}.method",
            explicit["method"],
            f"{options['method']!r} with preset {preset!r}",
            "Leave out method, or leave out preset and set its other options by hand",
        )
