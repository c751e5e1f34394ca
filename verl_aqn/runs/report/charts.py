"""Charts as geometry for the page: SVG without text, with labels in HTML next to it.

The drawing is stretched to the available width (`preserveAspectRatio="none"`, strokes that do not scale), so that
letters and lines have the same size on a desktop and on a phone, and colours come from the page's style in light and
dark mode. All positions are percent of the drawing, from the left and from the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

COLOURS = 8  # in report.css
MARGIN = 2.0  # percent of the drawing that stays free on the left and the right: room for dots and for `Series.shift`
ZERO_BAND = 12.0  # percent of a logarithmic drawing that is reserved for zeros, below everything else
DOTS = 120  # a line with more points than this has no dots


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    `points` are (x, y) in order of x; if y is None, the line has a gap. `bars` are (low, high) of each point, or empty.
    `run` is the index of the run that the line belongs to, which the page can hide; `dash` is 0 (solid), 1 or 2.
    `shift` moves the whole line sideways, in percent of the drawing, so that intervals at the same x do not overlap.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int
    run: int | None = None
    dash: int = 0
    bars: Sequence[tuple[float, float]] = ()
    shift: float = 0.0
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """Lines over a common x. Charts of one `group` share their x axis and its cursor; `span` is that axis.

    `unit` follows a value in text; the value has the format `form`, or four digits. `zero`: the y axis begins at 0.
    `log`: the y axis is logarithmic, and zeros have a line of their own. `lines` are horizontal lines for comparison.
    """

    key: str
    title: str
    series: Sequence[Series]
    span: tuple[float, float]
    note: str = ""
    unit: str = ""
    form: str = ""
    x_name: str = "step"
    group: str = "steps"
    zero: bool = False
    log: bool = False
    lines: Sequence[float] = ()
    tall: bool = False

    @cached_property
    def xs(self) -> list[float]:
        """Return every x that some series has."""
        return sorted({x for series in self.series for x, _ in series.points})

    def at(self, x: float) -> float:
        low, high = self.span
        return 50.0 if high <= low else MARGIN + (100 - 2 * MARGIN) * (x - low) / (high - low)

    def up(self, y: float) -> float:
        low, high = self._y_span
        if not self.log:
            return 100 - 100 * (y - low) / (high - low)
        room = 100 - (ZERO_BAND if self._has_zero else 0)
        return 100.0 if y <= 0 else room - room * (math.log10(y) - low) / (high - low)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        return [(self.at(x), number(x)) for x in ticks(*self.span, whole=True) if self.span[0] <= x <= self.span[1]]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        low, high = self._y_span
        if not self.log:
            return [(self.up(y), number(y)) for y in ticks(low, high) if low <= y <= high * (1 + 1e-9)]
        first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
        apart = max(1, math.ceil((last - first + 1) / 6))
        marks = [10.0**power for power in range(first, last + 1, apart)]
        if len(marks) < 2:
            marks = sorted(
                digit * 10.0**power
                for power in range(math.floor(low), math.ceil(high) + 1)
                for digit in (1, 2, 5)
                if low - 1e-9 <= math.log10(digit * 10.0**power) <= high + 1e-9
            )
        zero = [(100.0, "0")] if self._has_zero else []
        return [(self.up(y), number(y)) for y in marks] + zero

    @cached_property
    def _values(self) -> list[float]:
        ends = [end for series in self.series for bar in series.bars for end in bar]
        values = [y for series in self.series for _, y in series.points if y is not None]
        return [*values, *ends, *self.lines]

    @property
    def _has_zero(self) -> bool:
        return self.log and any(y <= 0 for y in self._values)

    @cached_property
    def _y_span(self) -> tuple[float, float]:
        if self.log:
            powers = [math.log10(y) for y in self._values if y > 0] or [-1.0, 0.0]
            low, high = min(powers), max(powers)
            room = max(0.05 * (high - low), 0.1)
            return low - room, high + room
        low, high = min(self._values, default=0.0), max(self._values, default=1.0)
        if self.zero:
            low, high = min(low, 0.0), max(high, 0.0)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return (low if self.zero and low == 0 else low - room), high + room

    def line(self, series: Series) -> str:
        """Return the path of a line, broken at gaps and between zeros and the logarithmic part."""
        if not series.joined:
            return ""
        parts, before = [], None
        for x, y in series.points:
            if y is not None:
                joined = before is not None and not (self._has_zero and (before <= 0) != (y <= 0))
                parts.append(f"{'L' if joined else 'M'}{self.at(x) + series.shift:.2f} {self.up(y):.2f}")
            before = y
        return "".join(parts)

    def dots(self, series: Series) -> str:
        """Return a path of strokes without length, whose round ends are the dots.

        The dots stay round when the drawing is stretched.
        """
        if len(series.points) > DOTS:
            return ""
        return "".join(
            f"M{self.at(x) + series.shift:.2f} {self.up(y):.2f}h0" for x, y in series.points if y is not None
        )

    def bar_path(self, series: Series) -> str:
        """Return the path of the intervals of the points."""
        return "".join(
            f"M{self.at(x) + series.shift:.2f} {self.up(low):.2f}V{self.up(high):.2f}"
            for (x, y), (low, high) in zip(series.points, series.bars, strict=False)
            if y is not None
        )

    def text(self, y: float | None, bar: tuple[float, float] | None = None) -> str:
        """Format a value as the legend and the table show it."""
        if y is None:
            return "–"
        interval = f" [{self.plain(bar[0])}, {self.plain(bar[1])}]" if bar else ""
        return f"{self.plain(y)}{self.unit}{interval}"

    def plain(self, value: float) -> str:
        """Format a value without its unit."""
        return format(value, self.form) if self.form else number(value)

    def values(self, series: Series) -> list[str]:
        """Return the texts of a series at every x of the chart, "" where the series has no point."""
        bars: Sequence[tuple[float, float] | None] = series.bars or [None] * len(series.points)
        found = {x: self.text(y, bar) for (x, y), bar in zip(series.points, bars, strict=True)}
        return [found.get(x, "") for x in self.xs]

    def last(self, series: Series) -> str:
        """Return the text of the last point that has a value."""
        return next((text for text in reversed(self.values(series)) if text not in ("", "–")), "–")

    @property
    def summary(self) -> str:
        """Describe the chart in words, one sentence per series."""
        parts = []
        for series in self.series:
            known = [(x, y) for x, y in series.points if y is not None]
            if not known:
                parts.append(f"{series.name}: no values")
                continue
            (first, began), (last, ended) = known[0], known[-1]
            least, most = min(known, key=lambda one: one[1]), max(known, key=lambda one: one[1])
            text = f"{series.name}: {self.text(began)} at {self.x_name} {number(first)}"
            if len(known) > 1:
                text += f", {self.text(ended)} at {number(last)}"
            if len(known) > 2:
                text += f"; minimum {self.text(least[1])} at {number(least[0])}"
                text += f", maximum {self.text(most[1])} at {number(most[0])}"
            parts.append(text)
        return ". ".join(parts) + "."

    @property
    def data(self) -> dict:
        """Return what the page's script needs to show the values at the cursor."""
        return {
            "group": self.group,
            "x": [number(x) for x in self.xs],
            "at": [round(self.at(x), 2) for x in self.xs],
            "text": [self.values(series) for series in self.series],
        }


def aside(place: int, number_of: int) -> float:
    """Return how far series number `place` of `number_of` is shifted sideways, in percent of the drawing."""
    return (place - (number_of - 1) / 2) * min(0.7, 2 * MARGIN / max(number_of, 1))


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return about five round numbers that cover [low, high]."""
    from matplotlib.ticker import MaxNLocator  # takes half a second to import, and only a report needs it

    locator = MaxNLocator(nbins=6 if whole else 4, steps=[1, 2, 2.5, 5, 10], integer=whole)
    return [float(value) for value in locator.tick_values(low, high if high > low else low + 1)]


def number(value: float) -> str:
    """Format a number with four digits, without trailing zeros: 0.6042, 29, 1e-5."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if 1e-3 <= abs(value) < 1e6:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return text
    mantissa, _, power = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"
