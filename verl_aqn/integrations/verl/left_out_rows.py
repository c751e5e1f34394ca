"""Rows of the data that a run leaves out: counted, with the reason and an example.

verl's data set leaves out prompts that are too long, and counts those that it cannot render as such.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, open_dict
from verl.utils.dataset.rl_dataset import RLHFDataset

from verl_aqn.errors import DataError, first_line
from verl_aqn.tasks.data_files import count_rows


@dataclass(frozen=True)
class Rows:
    """What became of the rows of a set's files. `drawn`: as many as `max_samples` let through.

    `too_long` and `failed` are left out of those; `failed` ones could not be rendered. Examples name the first row.
    """

    files: int
    drawn: int
    kept: int
    too_long: int = 0
    failed: int = 0
    too_long_example: str = ""
    failed_example: str = ""

    @property
    def text(self) -> str:
        """For example: 2,048 rows, 2 too long (row 7: 1,203 tokens of at most 1,024), 2,046 kept."""
        parts = [f"{self.files:,} rows"]
        if self.drawn < self.files:
            parts.append(f"{self.drawn:,} drawn (max_samples)")
        if self.too_long:
            parts.append(f"{self.too_long:,} too long ({self.too_long_example})")
        if self.failed:
            parts.append(f"{self.failed:,} that cannot be rendered ({self.failed_example})")
        if left := self.drawn - self.kept - self.too_long - self.failed:
            parts.append(f"{left:,} left out by the data set's class")
        return f"{', '.join(parts)}, {self.kept:,} kept"


class _Limit(int):
    """`max_prompt_length`, which notes what verl does with it for one row: verl's own pass says no more than yes or no.

    verl compares `length <= limit`, which asks the limit first, as its type is the more special one. Where rendering
    raised, verl takes `limit + 1` for the length within its `except`, so that the error is at hand.
    """

    length: int = -1
    error: str = ""

    def __ge__(self, length: int) -> bool:
        self.length = int(length)
        return int(self) >= int(length)

    def __add__(self, other: int) -> int:
        if error := sys.exc_info()[1]:
            self.error = f"{type(error).__name__}: {first_line(error)}"
        return int(self) + other


class _OnePass:
    """Stands for verl's table while verl filters it: one pass that keeps lengths and errors beside yes and no."""

    def __init__(self, table: Any, limit: _Limit) -> None:
        self.table, self.limit = table, limit
        self.lengths: list[int] = []
        self.errors: list[str] = []

    def filter(self, keep: Callable[[dict], bool], num_proc: int | None = None, desc: str | None = None) -> Any:
        limit = self.limit

        def look(row: dict) -> dict:
            limit.length, limit.error = -1, ""
            return {"keep": bool(keep(row)), "length": limit.length, "error": limit.error}

        several = num_proc if num_proc and num_proc > 1 else None  # a pool of one process takes seconds to start
        found = self.table.map(look, remove_columns=self.table.column_names, num_proc=several, desc=desc)
        self.lengths, self.errors = list(found["length"]), list(found["error"])
        return self.table.select([place for place, kept in enumerate(found["keep"]) if kept])

    def __len__(self) -> int:
        return len(self.table)


class ToldDataset(RLHFDataset):
    """verl's data set, which also tells what it left out, as `rows`."""

    rows: Rows
    max_prompt_length: int

    def maybe_filter_out_long_prompts(self, dataframe=None):
        limit = int(self.max_prompt_length)
        noting = _OnePass(dataframe, _Limit(limit))
        self.max_prompt_length = noting.limit
        try:
            kept = super().maybe_filter_out_long_prompts(noting)
        finally:
            self.max_prompt_length = limit
        kept = dataframe if kept is noting else kept
        sizes = [count_rows(file) for file in self.data_files]
        failed = [place for place, error in enumerate(noting.errors) if error]
        long = [place for place, size in enumerate(noting.lengths) if size > limit and not noting.errors[place]]

        def where(place: int) -> str:
            return self._where(place, sizes, drawn=len(dataframe) < sum(sizes) and self.shuffle)

        self.rows = Rows(
            sum(sizes), len(dataframe), len(kept), len(long), len(failed),
            f"{where(long[0])}: {noting.lengths[long[0]]:,} tokens of at most {limit:,}" if long else "",
            f"{where(failed[0])}: {noting.errors[failed[0]]}" if failed else "",
        )  # fmt: skip
        return kept

    def _where(self, place: int, sizes: Sequence[int], drawn: bool) -> str:
        """Name a row, counted from 0: within its file, or among those drawn where they were drawn by chance."""
        if drawn:
            return f"row {place:,} of those drawn"
        for file, size in zip(self.data_files, sizes, strict=True):
            if place < size:
                return f"row {place:,} of {file}" if len(sizes) > 1 else f"row {place:,}"
            place -= size
        raise AssertionError("a row beyond the files")


@contextmanager
def told_rows(config: DictConfig) -> Iterator[None]:
    """Let verl make its data sets of `ToldDataset`, unless the recipe names a class of the user's own."""
    before = config.data.get("custom_cls")
    if before and before.get("path") is not None:
        yield
        return
    with open_dict(config.data):
        config.data.custom_cls = {"path": f"pkg://{__name__}", "name": ToldDataset.__name__}
        try:
            yield
        finally:
            if before is None:
                del config.data.custom_cls
            else:
                config.data.custom_cls = before


def rows_of(dataset: Any, files: Sequence[str]) -> Rows:
    """What became of the rows; of a data set of another class only how many there were and are."""
    if (rows := getattr(dataset, "rows", None)) is not None:
        return rows
    try:
        held = sum(map(count_rows, files))
    except DataError:  # a form that only that class knows
        held = len(dataset)
    return Rows(held, held, len(dataset))
