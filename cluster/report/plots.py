"""Plots as inline SVG: axes, ticks, lines, dots, and what the pointer reads.

Colours are CSS classes of the page (`s0` .. `s7`, dashes beyond), so that one domain has one
colour everywhere and both colour schemes are served. Built as an element tree: text is escaped
by construction. Knows nothing of runs.

x, y are data; px is the drawing's own unit, a pixel at full size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from textwrap import wrap
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 12, 40
ROW_HEIGHT, NAME_PX, NAME_CHARS = 30, 17, 52  # of a row with a line of its name, which is above it
COLOURS, MAX_POINTS, MAX_READINGS = 8, 240, 100
DASHES = ("", "7 3", "2 3", "9 3 2 3")

Point = tuple[float, float]
Style = Literal["line", "steps", "dots"]
Shape = Literal["hollow", "filled", "diamond", "bar"]


@dataclass(frozen=True, slots=True)
class Series:
    """One named curve. `colour` counts on beyond the palette, with other dashes; -1 is ink."""

    name: str
    points: tuple[Point, ...]  # ascending x, finite
    colour: int = -1
    style: Style = "line"


@dataclass(frozen=True, slots=True)
class Mark:
    """One value of a row in `row_plot`."""

    label: str
    value: float
    shape: Shape


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to px."""

    low: float
    high: float
    start_px: float
    stop_px: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start_px + share * (self.stop_px - self.start_px), 1)


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high]."""
    span = (high - low) or abs(high) or 1.0
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def compact(value: float) -> str:
    """A tick's label: 0.25, 12, 3.4k, 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share as a tick's label."""
    return f"{value * 100:.3g} %"


def line_plot(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    format_y: Callable[[float], str] = compact,
    from_zero: bool = True,
) -> Markup:
    """Curves over steps, with readings of all curves at the pointer's step."""
    series = [thinned(s) for s in series if s.points]
    if not series:
        return Markup('<p class="none">Nothing measured yet.</p>')
    xs = sorted({x for s in series for x, _ in s.points})
    ys = [y for s in series for _, y in s.points]
    y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys), most=5)
    x_ticks = [t for t in ticks(xs[0], xs[-1]) if xs[0] <= t <= xs[-1]] or [xs[0]]
    lone = 0.5 if xs[0] == xs[-1] else 0.0
    x = Scale(xs[0] - lone, xs[-1] + lone, LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    svg = _canvas(label, HEIGHT)
    _axes(svg, x, y, x_ticks=x_ticks, y_ticks=y_ticks, x_label=x_label, format_y=format_y)
    for one in series:
        _draw(svg, one, x, y)
    _readings(svg, series, xs, x=x, format_y=format_y, x_label=x_label)
    return _markup(svg)


def area_plot(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    format_y: Callable[[float], str] = compact,
) -> Markup:
    """Parts of a whole over steps, one upon the other, the first at the bottom. A part that is not
    there at a step is nothing there."""
    xs = sorted({x for s in series for x, _ in s.points})
    if not xs:
        return Markup('<p class="none">Nothing measured yet.</p>')
    parts = [dict(s.points) for s in series]
    filled = [
        thinned(Series(s.name, tuple((at, part.get(at, 0.0)) for at in xs), s.colour))
        for s, part in zip(series, parts, strict=True)
    ]
    shown = [at for at, _ in filled[0].points]
    tops = list(accumulate(([y for _, y in s.points] for s in filled), _summed))
    y_ticks = ticks(0.0, max(tops[-1]), most=5)
    x_ticks = [t for t in ticks(shown[0], shown[-1]) if shown[0] <= t <= shown[-1]] or [shown[0]]
    x = Scale(shown[0] - 0.5, shown[-1] + 0.5, LEFT, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    svg = _canvas(label, HEIGHT)
    edges = [shown[0] - 0.5, *shown[1:-1], shown[-1] + 0.5]
    if len(shown) == 1:  # a bar
        edges, tops = [edges[0], edges[-1]], [top * 2 for top in tops]
    for one, below, top in zip(filled, [[0.0] * len(edges), *tops], tops, strict=False):
        around = [*zip(edges, top, strict=True)], [*zip(edges, below, strict=True)][::-1]
        outline = " ".join(f"{x(px):g},{y(py):g}" for side in around for px, py in side)
        SubElement(svg, "polygon", {"class": f"area {_slot(one.colour)}", "points": outline})
    _axes(svg, x, y, x_ticks=x_ticks, y_ticks=y_ticks, x_label=x_label, format_y=format_y)
    _readings(svg, filled, shown, x=x, format_y=format_y, x_label=x_label)
    return _markup(svg)


def _summed(below: list[float], part: list[float]) -> list[float]:
    return [low + high for low, high in zip(below, part, strict=True)]


def _axes(
    svg: Element,
    x: Scale,
    y: Scale,
    *,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    format_y: Callable[[float], str],
) -> None:
    """Grid lines, ticks and their labels."""
    for tick in y_ticks:
        _line(svg, "grid", LEFT, y(tick), WIDTH - RIGHT, y(tick))
        _text(svg, "tick end", LEFT - 6, y(tick) + 4, format_y(tick))
    for tick in x_ticks:
        _line(svg, "axis", x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 4)
        _text(svg, "tick middle", x(tick), HEIGHT - BOTTOM + 17, compact(tick))
    _line(svg, "axis", LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM)
    _text(svg, "label middle", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label)


def thinned(series: Series) -> Series:
    """At most MAX_POINTS points: means of equally many neighbours. Steps stay as they are."""
    group = -(-len(series.points) // MAX_POINTS)
    if group <= 1 or series.style == "steps":
        return series
    chunks = [series.points[i : i + group] for i in range(0, len(series.points), group)]
    points = tuple((c[-1][0], sum(y for _, y in c) / len(c)) for c in chunks)
    return Series(series.name, points, series.colour, series.style)


def row_plot(rows: dict[str, list[Mark]], *, label: str, x_label: str) -> Markup:
    """A line per name with its marks on a common axis; the span from first to last is drawn."""
    values = [mark.value for marks in rows.values() for mark in marks]
    if not values:
        return Markup('<p class="none">Nothing measured yet.</p>')
    x_ticks = ticks(0.0, max(values))
    x = Scale(x_ticks[0], x_ticks[-1], LEFT / 2, WIDTH - RIGHT - 8)
    tops = [*accumulate(map(_row_height, rows), initial=TOP)]
    bottom = tops[-1]
    svg = _canvas(label, bottom + BOTTOM)
    for tick in x_ticks:
        _line(svg, "grid", x(tick), TOP, x(tick), bottom)
        _text(svg, "tick middle", x(tick), bottom + 15, compact(tick))
    _text(svg, "label middle", WIDTH / 2, bottom + 33, x_label)
    for i, (name, marks) in enumerate(rows.items()):
        _row(svg, name, marks, colour=i, x=x, top_px=tops[i])
    return _markup(svg)


def swatch(colour: int, *, style: Style = "line") -> Markup:
    """A legend's sample of a series."""
    svg = Element("svg", {"class": "swatch", "viewBox": "0 0 22 10", "aria-hidden": "true"})
    if style == "dots":
        SubElement(
            svg, "circle", {"class": f"dot {_slot(colour)}", "cx": "11", "cy": "5", "r": "3"}
        )
    else:
        _curve(svg, [(0, 5), (22, 5)], colour)
    return _markup(svg)


def shape_swatch(shape: Shape) -> Markup:
    """A legend's sample of a mark."""
    svg = Element("svg", {"class": "swatch", "viewBox": "0 0 22 14", "aria-hidden": "true"})
    _shape(svg, shape, 11, 7, "ink")
    return _markup(svg)


def _canvas(label: str, height: float) -> Element:
    box = f"0 0 {WIDTH} {height:g}"
    return Element("svg", {"class": "plot", "viewBox": box, "role": "img", "aria-label": label})


def _draw(svg: Element, series: Series, x: Scale, y: Scale) -> None:
    points = [(x(px), y(py)) for px, py in series.points]
    if series.style == "dots" or len(points) == 1:
        for cx, cy in points:
            radius = "2.1" if series.style == "dots" else "3"
            place = {"cx": f"{cx:g}", "cy": f"{cy:g}", "r": radius}
            SubElement(svg, "circle", {"class": f"dot {_slot(series.colour)}", **place})
    elif series.style == "steps":
        corners = [points[0]]
        for (_, before), (cx, cy) in pairwise(points):
            corners += [(cx, before), (cx, cy)]
        _curve(svg, corners, series.colour)
    else:
        _curve(svg, points, series.colour)


def _curve(svg: Element, points: Sequence[Point], colour: int) -> None:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    dash = DASHES[max(0, colour) // COLOURS % len(DASHES)]
    drawn = {"class": f"curve {_slot(colour)}", "points": path}
    SubElement(svg, "polyline", drawn | ({"stroke-dasharray": dash} if dash else {}))


def _readings(
    svg: Element,
    series: Sequence[Series],
    xs: Sequence[float],
    *,
    x: Scale,
    format_y: Callable[[float], str],
    x_label: str,
) -> None:
    """Invisible strips whose titles list every curve's value there."""
    shown = xs[:: -(-len(xs) // MAX_READINGS)]
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(shown))]
    edges.append(WIDTH - RIGHT)
    for at, start, stop in zip(shown, edges, edges[1:], strict=False):
        strip = SubElement(svg, "g", {"class": "strip"})
        area = {"x": f"{start:g}", "width": f"{stop - start:g}"}
        SubElement(strip, "rect", area | {"y": str(TOP), "height": str(HEIGHT - TOP - BOTTOM)})
        _line(strip, "cursor", x(at), TOP, x(at), HEIGHT - BOTTOM)
        lines = [
            f"{s.name}: {format_y(value)}" for s in series if (value := _at(s, at)) is not None
        ]
        SubElement(strip, "title").text = "\n".join([f"{x_label} {at:g}", *lines])


def _at(series: Series, x: float) -> float | None:
    """The curve's value at x: the last point's at or before it."""
    values = [y for px, y in series.points if px <= x]
    return values[-1] if values else None


def _row_height(name: str) -> int:
    return ROW_HEIGHT + NAME_PX * len(_lines(name))


def _lines(name: str) -> list[str]:
    return wrap(name, NAME_CHARS) or [name]


def _row(
    svg: Element, name: str, marks: list[Mark], *, colour: int, x: Scale, top_px: float
) -> None:
    """A name, and the marks below it."""
    row, height = SubElement(svg, "g", {"class": "strip"}), _row_height(name)
    area = {"x": "0", "y": f"{top_px:g}", "height": str(height)}
    SubElement(row, "rect", area | {"width": str(WIDTH)})
    for number, line in enumerate(_lines(name), start=1):
        _text(row, "name", x.start_px, top_px + NAME_PX * number, line)
    y_px = top_px + height - ROW_HEIGHT / 2
    ends = [mark.value for mark in marks if mark.shape in ("hollow", "filled")]
    if ends:
        _line(row, f"span {_slot(colour)}", x(ends[0]), y_px, x(ends[-1]), y_px)
    for mark in sorted(marks, key=lambda mark: mark.shape == "filled"):
        _shape(row, mark.shape, x(mark.value), y_px, _slot(colour))
    lines = [f"{mark.label}: {mark.value:.3f}" for mark in marks]
    SubElement(row, "title").text = "\n".join([name, *lines])


def _shape(svg: Element, shape: Shape, x: float, y: float, colour: str) -> None:
    if shape == "bar":
        _line(svg, "teacher", x, y - 8, x, y + 8)
    elif shape == "diamond":
        corners = f"{x - 5:g},{y:g} {x:g},{y - 5:g} {x + 5:g},{y:g} {x:g},{y + 5:g}"
        SubElement(svg, "polygon", {"class": f"hollow {colour}", "points": corners})
    else:
        place = {"cx": f"{x:g}", "cy": f"{y:g}", "r": "4.5"}
        SubElement(svg, "circle", {"class": f"{shape} {colour}", **place})


def _slot(colour: int) -> str:
    return "ink" if colour < 0 else f"s{colour % COLOURS}"


def _line(svg: Element, kind: str, x1: float, y1: float, x2: float, y2: float) -> None:
    place = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {"class": kind} | {k: f"{v:g}" for k, v in place.items()})


def _text(svg: Element, kind: str, x: float, y: float, text: str) -> None:
    SubElement(svg, "text", {"class": kind, "x": f"{x:g}", "y": f"{y:g}"}).text = text


def _markup(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))
