"""The recovered share of every method as one SVG: a dot per seed, a bar for the interval.

It stands alone: its colours and its ground are its own, so that it reads on light and dark pages.
px is the drawing's own unit.
"""

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from cluster.report.plots import Scale, compact, ticks
from tests.benchmarks.methods.cells import CELLS
from tests.benchmarks.methods.statistics import Record, estimate, mean_recovered
from tests.benchmarks.methods.table import of_cell

WIDTH, NAMES, RIGHT, TOP, ROW, BOTTOM = 720, 260, 20, 14, 26, 44
STYLE = """
.ground { fill: #ffffff } text { font: 13px sans-serif; fill: #1f2328 }
.grid { stroke: #d8dee4 } .bar { stroke: #0a5fb4; stroke-width: 2 }
.mean { fill: #0a5fb4 } .seed { fill: none; stroke: #0a5fb4; stroke-opacity: .55 }
.tick { fill: #59636e; text-anchor: middle; font-size: 12px } .name { text-anchor: end }
"""


def recovered_plot(records: Sequence[Record]) -> str:
    """SVG with one row for each cell of the table that has records."""
    rows = [
        (cell.title, [mean_recovered(record) for record in own])
        for cell in CELLS
        if (own := of_cell(records, cell))
    ]
    shown = [value for _, values in rows for value in (*values, *_ends(values))]
    x_ticks = ticks(min(shown), max(shown))
    x = Scale(x_ticks[0], x_ticks[-1], NAMES, WIDTH - RIGHT)
    bottom = TOP + ROW * len(rows)
    svg = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {bottom + BOTTOM}",
            "role": "img",
            "aria-label": "Share of the gap to the teacher that each method recovers",
        },
    )
    SubElement(svg, "style").text = STYLE
    size = {"width": str(WIDTH), "height": str(bottom + BOTTOM)}
    SubElement(svg, "rect", {"class": "ground"} | size)
    for tick in x_ticks:
        _line(svg, "grid", x(tick), TOP, x(tick), bottom)
        _text(svg, "tick", x(tick), bottom + 16, compact(tick))
    label = "recovered share of the gap in validation NLL, mean over domains"
    _text(svg, "tick", (NAMES + WIDTH - RIGHT) / 2, bottom + 34, label)
    for i, (title, values) in enumerate(rows):
        _row(svg, title, values, x=x, y_px=TOP + ROW * (i + 0.5))
    return tostring(svg, encoding="unicode") + "\n"


def _row(svg: Element, title: str, values: Sequence[float], *, x: Scale, y_px: float) -> None:
    _text(svg, "name", NAMES - 12, y_px + 4, title)
    ends = _ends(values)
    _line(svg, "bar", x(ends[0]), y_px, x(ends[1]), y_px)
    for value in values:
        _circle(svg, "seed", x(value), y_px, radius=4)
    _circle(svg, "mean", x(sum(values) / len(values)), y_px, radius=3)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Where the interval begins and ends; the value itself for a single seed."""
    found = estimate(values)
    width = 0.0 if math.isnan(found.half_width) else found.half_width
    return found.mean - width, found.mean + width


def _line(svg: Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    place = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {"class": kind} | {name: f"{v:g}" for name, v in place.items()})


def _circle(svg: Element, kind: str, x: float, y: float, *, radius: float) -> None:
    place = {"cx": f"{x:g}", "cy": f"{y:g}", "r": f"{radius:g}"}
    SubElement(svg, "circle", {"class": kind} | place)


def _text(svg: Element, kind: str, x: float, y: float, text: str) -> None:
    SubElement(svg, "text", {"class": kind, "x": f"{x:g}", "y": f"{y:g}"}).text = text
