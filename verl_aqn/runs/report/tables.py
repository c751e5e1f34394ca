"""Tables of the page, whose cells have sort keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl_aqn.runs.report.charts import Chart


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    `sort`: the number to sort the cell by; None sorts by its text. `good`: the result of a check, None if the cell is
    no check. `colour`: the colour of the run that the cell names.
    """

    text: str
    sort: float | None = None
    good: bool | None = None
    colour: int | None = None
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page. `numbers`: the columns that are right-aligned. The first cell of a row is its header."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: frozenset[int] = frozenset()
    sortable: bool = True


def chart_table(chart: Chart) -> Table:
    """Tabulate the values of a chart, one row per x."""
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
