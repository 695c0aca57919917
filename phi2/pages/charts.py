"""Charts as inline SVG: lines over steps, points of two quantities, and shares or differences with their intervals.

Colours are the CSS classes `c0`, `c1`, ... of `page.py`, so that a chart follows the light or dark page it stands in.
What a mark says is its `<title>`, which a browser shows under the pointer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 300, 177  # units of a line chart
LEFT, RIGHT, TOP, BOTTOM = 40, 6, 8, 32  # least margins around its plot
CHARACTER = 6  # units, of a tick's label
MOST_POINTS = 300  # of a line; more are averaged in groups
MARKED_POINTS = 12  # a line of no more is drawn with dots
COLOURS = 7  # classes of the page; of more lines the first stands out, and the others say their names when pointed at
OTHER = "other"  # class of those
OTHERS = f'<span class="key {OTHER}">others</span>'  # in the legend

Point = tuple[float, float]
Interval = tuple[float, float, float]  # low, value, high


class Line(NamedTuple):
    """One line: its name in the legend, its points from left to right, and the edges of a band around it."""

    label: str
    points: Sequence[Point]
    lower: Sequence[Point] = ()
    upper: Sequence[Point] = ()


class Axis(NamedTuple):
    """A scale from data to units of the drawing, its round numbers, and the digits in which these differ."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]
    digits: int = 4

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class LogAxis(Axis):
    """Equal ratios are equally far apart; values are above 0."""

    def at(self, value: float) -> float:
        return self.start + math.log(value / self.low) / math.log(self.high / self.low) * (self.end - self.start)


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """A figure of all lines over one axis of steps, the last value of each in the legend; "" without any point."""
    lines = [Line(line.label, *(thin(_finite(points)) for points in line[1:])) for line in lines]
    if not any(line.points for line in lines):
        return ""
    points = [point for line in lines for part in line[1:] for point in part]
    y = _values_axis([p[1] for p in points])
    x = _steps_axis([p[0] for p in points], _left(y))
    colours = _colours(len(lines))
    legend = "".join(
        f'<span class="key {colour}">{escape(line.label)} <b>{number(line.points[-1][1], y.digits)}</b></span>'
        for line, colour in zip(lines, colours, strict=True)
        if line.points and colour != OTHER
    )
    legend += OTHERS if OTHER in colours else ""
    named = [(line, colour) for line, colour in zip(lines, colours, strict=True) if line.points]
    bands = "".join(_band(line, x, y, colour) for line, colour in named if line.lower and colour != OTHER)
    drawn = "".join(_curve(line, x, y, colour) for line, colour in reversed(named))
    return _figure(title, legend, _grid(x, y, "step") + bands + drawn, WIDTH, HEIGHT)


def scatter_chart(title: str, groups: Mapping[str, Sequence[Point]], across: str, up: str) -> str:
    """A figure of the points of each group, in its colour; `across` and `up` name the axes. "" without any point.

    Where all are above 0 and far apart, those across stand by their logarithm.
    """
    groups = {name: [point for point in _finite(points) if math.isfinite(point[0])] for name, points in groups.items()}
    points = [point for group in groups.values() for point in group]
    if not points:
        return ""
    y = _values_axis([p[1] for p in points])
    x = _across_axis([p[0] for p in points], _left(y))
    colours = dict(zip(groups, _colours(len(groups)), strict=True))
    legend = "".join(
        f'<span class="key {colours[name]}">{escape(name)}</span>'
        for name in groups
        if groups[name] and colours[name] != OTHER
    )
    legend += OTHERS if OTHER in colours.values() else ""
    dots = "".join(
        f'<circle class="fill {colours[name]}" cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3.4"><title>{escape(name)}:'
        f" {escape(across)} {number(px, x.digits)}, {escape(up)} {number(py, y.digits)}</title></circle>"
        for name, group in reversed(groups.items())
        for px, py in group
    )
    return _figure(f"{title}: {up} over {across}", legend, _grid(x, y, across) + dots, WIDTH, HEIGHT)


def interval_chart(title: str, groups: Mapping[str, Mapping[str, Interval]]) -> str:
    """A figure of shares in [0, 1] with their intervals: a row for each group, in it a mark for each name."""
    names = list(dict.fromkeys(name for marks in groups.values() for name in marks))
    legend = "".join(f'<span class="key c{i}">{escape(name)}</span>' for i, name in enumerate(names))
    return _intervals(title, legend, names, groups, [0, 0.25, 0.5, 0.75, 1], "{:.0%}".format, "{:.1%}".format)


def difference_chart(title: str, groups: Mapping[str, Interval]) -> str:
    """A figure of differences to 0 with their intervals, a row for each group; "" without any."""
    known = {group: interval for group, interval in groups.items() if all(map(math.isfinite, interval))}
    if not known:
        return ""
    ticks = nice_ticks(*_range([0, *(end for interval in known.values() for end in interval)]), 4)
    marks = {group: {"difference": interval} for group, interval in known.items()}
    text = partial(number, digits=3)
    return _intervals(title, "", ["difference"], marks, ticks, text, text)


def _intervals(
    title: str,
    legend: str,
    names: Sequence[str],
    groups: Mapping[str, Mapping[str, Interval]],
    ticks: list[float],
    tick_text: Callable[[float], str],
    text: Callable[[float], str],
) -> str:
    """A row for each group, in it a mark for each name; a line at each tick, stronger at 0."""
    step, width = 12, 440
    left = max(82, 10 + CHARACTER * 1.15 * max(map(len, groups), default=0))
    rows, y = [], 10.0
    axis = Axis(ticks[0], ticks[-1], left, width - 16, ticks)
    for group, marks in groups.items():
        middle = y + step * (len(names) - 1) / 2
        rows.append(f'<text class="group" x="0" y="{middle + 4:.1f}">{escape(group)}</text>')
        for i, name in enumerate(names):
            if name in marks:
                said = f"{group}, {name}: {text(marks[name][1])}, 95 % interval {text(marks[name][0])} to"
                rows.append(_whisker(f"{said} {text(marks[name][2])}", marks[name], axis, y + step * i, f"c{i}"))
        y += step * len(names) + 13
    lines = "".join(
        f'<line class="{"grid" if t else "zero"}" x1="{axis.at(t):.1f}" x2="{axis.at(t):.1f}" y1="0"'
        f' y2="{y - 9:.1f}"/>'
        f'<text class="tick" text-anchor="middle" x="{axis.at(t):.1f}" y="{y + 6:.1f}">{tick_text(t)}</text>'
        for t in axis.ticks
    )
    return _figure(title, legend, lines + "".join(rows), width, round(y + 10))


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the means of groups of neighbours."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], math.fsum(y for _, y in group) / len(group)) for group in groups]


def nice_ticks(low: float, high: float, most: int, least_step: float = 0.0) -> list[float]:
    """A grid around the range, in steps of 1, 2 or 5 times a power of ten: the finest that needs `most` steps or so."""
    rough = max((high - low) / most, least_step)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def distinct_digits(ticks: Sequence[float]) -> int:
    """The digits of `number`, 4 or more, that bring each tick nearer to itself than to its neighbours."""
    near = min((b - a for a, b in pairwise(ticks)), default=math.inf) / 4
    return next((d for d in range(4, 18) if all(abs(_parsed(number(t, d)) - t) <= near for t in ticks)), 18)


def _parsed(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def number(value: float, digits: int = 4) -> str:
    """A number for people: significant digits, thousands whole and grouped, small ones with an exponent."""
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    elif size and size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}")


def counted(count: float, what: str) -> str:
    """So many of something."""
    return f"{number(count)} {what}{'' if count == 1 else 's'}"


def _figure(title: str, legend: str, drawn: str, width: int, height: int) -> str:
    return (
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong>{legend}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{drawn}</svg></figure>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value; some width around values that are all alike."""
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), sys.float_info.min):  # a part of the least number is none
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    return low, high


def _steps_axis(steps: Sequence[float], left: float) -> Axis:
    """From the first step to the last; ticks are whole steps inside."""
    low, high = _range(steps)
    ticks = [t for t in nice_ticks(low, high, 5, least_step=1) if low <= t <= high]
    return Axis(low, high, left, WIDTH - RIGHT, ticks, distinct_digits(ticks))


def _values_axis(values: Sequence[float]) -> Axis:
    """From the tick below the values to the tick above them, upwards."""
    ticks = nice_ticks(*_range(values), 4)
    return Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, ticks, distinct_digits(ticks))


def _across_axis(values: Sequence[float], left: float) -> Axis:
    """From left to right; a logarithmic one, with a tick at each power of ten, for values a hundredfold apart."""
    low, high = min(values), max(values)
    if low > 0 and high > 100 * low:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [10.0**power for power in range(first, last + 1)]
        return LogAxis(ticks[0], ticks[-1], left, WIDTH - RIGHT, ticks)
    return _values_axis(values)._replace(start=left, end=WIDTH - RIGHT)


def _left(y: Axis) -> float:
    """Where a plot begins beside the labels of its ticks."""
    return max(LEFT, 10 + CHARACTER * max(len(number(tick, y.digits)) for tick in y.ticks))


def _grid(x: Axis, y: Axis, across: str) -> str:
    rows = "".join(
        f'<line class="grid" x1="{x.start}" x2="{WIDTH - RIGHT}" y1="{y.at(t):.1f}" y2="{y.at(t):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{x.start - 6}" y="{y.at(t) + 3.5:.1f}">{number(t, y.digits)}</text>'
        for t in y.ticks
    )
    below = f'text-anchor="middle" y="{HEIGHT - BOTTOM + 14}"'
    columns = "".join(f'<text class="tick" {below} x="{x.at(t):.1f}">{number(t, x.digits)}</text>' for t in x.ticks)
    middle = (x.start + x.end) / 2
    name = f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{HEIGHT - 4}">{escape(across)}</text>'
    return rows + columns + name


def _colours(count: int) -> list[str]:
    """The classes of so many lines, or of so many groups of points."""
    return [f"c{i}" for i in range(count)] if count <= COLOURS else ["c0", *(count - 1) * [OTHER]]


def _curve(line: Line, x: Axis, y: Axis, colour: str) -> str:
    """Few points: a line with dots. Many: a pale line and, bold upon it, its running mean."""
    if len(line.points) <= MARKED_POINTS:
        dots = "".join(
            f'<circle class="fill {colour}" cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="2.6">'
            f"<title>{escape(line.label)} {number(py, y.digits)} at step {number(px, x.digits)}</title></circle>"
            for px, py in line.points
        )
        return _path(line.points, x, y, colour) + dots
    return _path(line.points, x, y, f"pale {colour}") + _path(_running_mean(line.points), x, y, colour)


def _band(line: Line, x: Axis, y: Axis, colour: str) -> str:
    edge = [*line.lower, *reversed(line.upper)]
    places = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in edge)
    return f'<polygon class="band {colour}" points="{places}"/>'


def _path(points: Sequence[Point], x: Axis, y: Axis, style: str) -> str:
    places = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in points)
    return f'<polyline class="{style}" points="{places}"/>'


def _running_mean(points: Sequence[Point]) -> list[Point]:
    """Mean over a window that is centred, and shrinks towards both ends."""
    reach = max(1, len(points) // 25)
    means = []
    for i, (px, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        window = points[i - near : i + near + 1]
        means.append((px, math.fsum(py for _, py in window) / len(window)))
    return means


def _whisker(said: str, interval: Interval, axis: Axis, y: float, colour: str) -> str:
    low, value, high = interval
    return (
        f'<g><title>{escape(said)}</title><line class="whisker {colour}" x1="{axis.at(low):.1f}" '
        f'x2="{axis.at(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle class="fill {colour}" cx="{axis.at(value):.1f}" cy="{y:.1f}" r="4"/></g>'
    )
