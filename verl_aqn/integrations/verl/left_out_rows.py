"""Counts of the data rows that a run leaves out, with the reason and an example.

verl's data set leaves out prompts that are too long, and treats prompts that it cannot render as too long.
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

UNFILTERED = (
    "set data.filter_overlong_prompts=true to leave such rows out, or data.truncation=left to cut off the beginning of "
    "long prompts"
)
"""What to do about a row that `data.truncation=error` does not allow."""


@dataclass(frozen=True)
class Rows:
    """Counts of the rows in a set's files: `files` in all, and `kept` in the data set.

    `drawn`: rows that remain after `max_samples`. `too_long` and `failed`: drawn rows that are left out; `failed` rows
    could not be rendered. The examples name the first such row.
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
        """Return the counts in one line: 2,048 rows, 2 too long (row 7: 1,203 tokens of at most 1,024), 2,046 kept."""
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
    """A `max_prompt_length` that records the length or the error of a row, because verl's filter returns only a bool.

    verl compares `length <= limit`. Python then calls the limit's method first, because its type is a subclass of int.
    If rendering raises an error, verl uses `limit + 1` as the length inside its `except` block, where the error can be
    read.
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
    """Replaces verl's table while verl filters it: one pass that keeps lengths and errors beside verl's decisions."""

    def __init__(self, table: Any, limit: _Limit) -> None:
        self.table, self.limit = table, limit
        self.lengths: list[int] = []
        self.errors: list[str] = []

    def filter(self, keep: Callable[[dict], bool], num_proc: int | None = None, desc: str | None = None) -> Any:
        limit = self.limit

        def look(row: dict) -> dict:
            limit.length, limit.error = -1, ""
            return {"keep": bool(keep(row)), "length": limit.length, "error": limit.error}

        several = num_proc if num_proc and num_proc > 1 else None  # starting a pool for one process takes seconds
        found = self.table.map(look, remove_columns=self.table.column_names, num_proc=several, desc=desc)
        self.lengths, self.errors = list(found["length"]), list(found["error"])
        return self.table.select([place for place, kept in enumerate(found["keep"]) if kept])

    def __len__(self) -> int:
        return len(self.table)


class ToldDataset(RLHFDataset):
    """verl's data set, which also counts in `rows` what it left out.

    Raises:
        DataError: without `data.filter_overlong_prompts`, a prompt is too long, and `data.truncation` is error. verl
            itself does not use this setting, and would cut off the beginning of the prompt.
    """

    rows: Rows
    max_prompt_length: int
    filter_overlong_prompts: bool

    def maybe_filter_out_long_prompts(self, dataframe=None):
        limit, filters = int(self.max_prompt_length), self.filter_overlong_prompts
        noting = _OnePass(dataframe, _Limit(limit))
        self.max_prompt_length = noting.limit
        self.filter_overlong_prompts = filters or self.truncation == "error"
        try:
            kept = super().maybe_filter_out_long_prompts(noting)
        finally:
            self.max_prompt_length, self.filter_overlong_prompts = limit, filters
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
        if not filters and len(kept) < len(dataframe):
            raise DataError(f"{', '.join(self.data_files)}: {self.rows.text.rpartition(', ')[0]}: {UNFILTERED}")
        return kept if filters else dataframe

    def _where(self, place: int, sizes: Sequence[int], drawn: bool) -> str:
        """Name a row, counted from 0: within its file, or among the drawn rows if these were drawn at random."""
        if drawn:
            return f"row {place:,} of those drawn"
        for file, size in zip(self.data_files, sizes, strict=True):
            if place < size:
                return f"row {place:,} of {file}" if len(sizes) > 1 else f"row {place:,}"
            place -= size
        raise AssertionError("a row beyond the files")


@contextmanager
def told_rows(config: DictConfig) -> Iterator[None]:
    """Make verl use `ToldDataset` for its data sets, unless the recipe names the user's own class."""
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
    """Return the counts of a data set; for other classes than `ToldDataset` only the rows before and after."""
    if (rows := getattr(dataset, "rows", None)) is not None:
        return rows
    try:
        count = sum(map(count_rows, files))
    except DataError:  # a file format that only the user's class can read
        count = len(dataset)
    return Rows(count, count, len(dataset))
