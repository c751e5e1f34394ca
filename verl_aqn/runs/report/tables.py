"""Tables of the page: cells know what they are sorted by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_aqn.runs.report.charts import Chart


@dataclass(frozen=True)
class Cell:
    """`sort`: the number to sort the cell by, None for its text. `good`: whether a check held, None for no check.

    `colour`: of the run whose name it is.
    """

    text: str
    sort: float | None = None
    good: bool | None = None
    colour: int | None = None
    code: bool = False


@dataclass(frozen=True)
class Table:
    """`numbers`: which columns are right-aligned. The first cell of a row is its header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: frozenset[int] = frozenset()
    sortable: bool = True


def chart_table(chart: Chart) -> Table:
    """The values of a chart, a row an x."""
    columns = [chart.values(series) for series in chart.series]
    sorts = [dict(series.points) for series in chart.series]
    rows = [
        [
            Cell(f"{x:g}", x),
            *(Cell(texts[at] or "–", known.get(x)) for texts, known in zip(columns, sorts, strict=True)),
        ]
        for at, x in enumerate(chart.xs)
    ]
    names = [series.name for series in chart.series]
    return Table(chart.title, [chart.x_name, *names], rows, frozenset(range(len(names) + 1)))
