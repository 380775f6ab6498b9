"""Small log-log pictures as SVG, the same bytes on every machine, so that a test can hold them against the rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 520, 330, 58, 30, 158, 44
"""Of a panel and its margins, in pixels; the legend is in the right one."""
COLOURS = ("#1f6fb4", "#7fb3d9", "#3aa6a0", "#d1495b", "#8f5a2b", "#e0a030", "#3a9d5d", "#8f6bb3")
STYLE = (
    "text{font-size:11px;fill:#333}.t{font-size:13px;font-weight:bold}.g{stroke:#e2e2e2}.l{fill:none;stroke-width:1.6}"
    ".d{stroke:#555;stroke-dasharray:5 4}.m{stroke-width:5;stroke-linecap:round}"
)


@dataclass(frozen=True)
class Series:
    """One line of a panel: (x, y), ascending in x, all above 0."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    """Index of COLOURS; a variant has the same in all panels."""
    dashed: bool = False
    """For limits and ideals: no marks."""
    joined: bool = True
    """False for marks without a line."""


@dataclass(frozen=True)
class Panel:
    """One log-log diagram."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_name: Callable[[float], str] = lambda x: f"{x:g}"
    """What stands at a mark of the x axis."""


def ticks(low: float, high: float, steps: Sequence[float]) -> list[float]:
    """Numbers of the form step * 10^n in [low, high]."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [step * 10.0**decade for decade in decades for step in steps]
    return [float(f"{number:.6g}") for number in found if low * 0.999 <= number <= high * 1.001]


def y_ticks(low: float, high: float) -> list[float]:
    """Few of them, however many decades there are."""
    for steps in ((1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        found = ticks(low, high, steps)
        if len(found) <= 8:
            break
    return found


def draw(panels: Sequence[Panel]) -> str:
    """The panels, two side by side. Each has at least one point."""
    width, height = WIDTH * min(len(panels), 2), HEIGHT * -(-len(panels) // 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, panel in enumerate(panels):
        lines += [
            f'<g transform="translate({WIDTH * (index % 2)},{HEIGHT * (index // 2)})">',
            *draw_panel(panel),
            "</g>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def draw_panel(panel: Panel) -> list[str]:
    """The elements of one panel, in its own coordinates."""
    points = [point for series in panel.series for point in series.points]
    (x_low, x_high), (y_low, y_high) = (
        (min(point[axis] for point in points), max(point[axis] for point in points)) for axis in (0, 1)
    )
    # Room above and below, and some extent where all points are alike.
    x_low, x_high, y_low, y_high = x_low / 1.08, x_high * 1.08, y_low / 1.25, y_high * 1.25
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        return round(LEFT + inner_width * math.log(x / x_low) / math.log(x_high / x_low), 1)

    def down(y: float) -> float:
        return round(TOP + inner_height * (1 - math.log(y / y_low) / math.log(y_high / y_low)), 1)

    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    grid, names = "", []
    for y in y_ticks(y_low, y_high):
        grid += f"M{LEFT} {down(y)}H{right}"
        names.append(f'<text x="{LEFT - 20}" y="{down(y) + 4:g}">{y:g}</text>')
    # Marks of the x axis are where the points are, as far as they have room.
    taken = -math.inf
    for x in sorted({point[0] for point in points}):
        if across(x) - taken >= 28:
            grid += f"M{across(x)} {TOP}V{bottom}"
            names.append(f'<text x="{across(x)}" y="{bottom + 15}">{escape(panel.x_name(x))}</text>')
            taken = across(x)
    middle = (TOP + bottom) / 2
    lines = [
        f'<text class="t" x="{LEFT}" y="18">{escape(panel.title)}</text>',
        f'<path class="g" d="{grid}"/>',
        '<g text-anchor="middle">',
        *names,
        f'<text x="{(LEFT + right) / 2:g}" y="{HEIGHT - 8}">{escape(panel.x_label)}</text>',
        f'<text x="14" y="{middle:g}" transform="rotate(-90 14 {middle:g})">{escape(panel.y_label)}</text>',
        "</g>",
    ]
    for index, series in enumerate(panel.series):
        y = TOP + 10 + 17 * index
        places = [(across(x), down(y)) for x, y in series.points]
        path = f"M{right + 8} {y}h18"
        if series.joined:
            path += "M" + "L".join(f"{x} {y}" for x, y in places)
        if series.dashed:
            lines.append(f'<path class="l d" d="{path}"/>')
        else:
            colour = COLOURS[series.colour]
            lines.append(f'<path class="l" stroke="{colour}" d="{path}"/>')
            # Lines of no length with round ends are discs.
            discs = "".join(f"M{x} {y}h0" for x, y in places)
            lines.append(f'<path class="m" stroke="{colour}" d="{discs}"/>')
        lines.append(f'<text x="{right + 30}" y="{y + 4}">{escape(series.label)}</text>')
    return lines
