"""Read a run's data files as verl's own data set class does: parquet, JSON, and JSON lines."""

import codecs
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl_aqn.errors import DataError, first_line
from verl_aqn.tasks.gsm8k import number

ENDINGS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
"""The file endings that verl knows, and the builder of `datasets` that verl reads each with."""

HELP = "docs/your_data.md shows how to write one"


def read_file(path: str | Path) -> Any:
    """Return the rows of a file as a `datasets.Dataset`, as verl does.

    Raises:
        DataError: the file is missing, has an ending that verl does not know, cannot be read, or has no rows.
    """
    import datasets

    path = Path(path)
    check_name(path)
    try:
        with _silent():
            found = datasets.load_dataset(ENDINGS[path.suffix], data_files=str(path))["train"]
    except Exception as error:  # whatever datasets, Arrow or pandas raise
        raise DataError(unreadable(path, error)) from error
    if not len(found):
        raise DataError(no_rows(path))
    return found


def count_rows(path: str | Path) -> int:
    """Return the number of rows of a file; for a parquet file only the footer is read.

    Raises the same errors as `read_file`.
    """
    path = Path(path)
    check_name(path)
    if path.suffix != ".parquet":
        return len(read_file(path))
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(unreadable(path, error)) from error
    if not rows:
        raise DataError(no_rows(path))
    return rows


def check_there(path: Path) -> None:
    """Check that a file exists. Raises DataError."""
    if re.match(r"\w{2,}:/", str(path)) and not os.path.exists(path):  # of the // in a URL a Path keeps one
        raise DataError(f"{path}: only files on a local disk can be read: copy it there and give the path of the copy")
    if not os.path.isfile(path):  # also for a name that is too long
        what = "a folder, not a file" if os.path.isdir(path) else "no such file"
        raise DataError(f"{path}: {what}: prepare the data or correct the path")


def check_name(path: Path) -> None:
    """Check that a file exists and that verl knows its ending. Raises DataError."""
    check_there(path)
    if path.suffix not in ENDINGS:
        raise DataError(
            f"{path}: verl reads files that end in {', '.join(ENDINGS)}: write the file in one of these formats; {HELP}"
        )


def no_rows(path: str | Path) -> str:
    """Return the message that a file has no rows."""
    return f"{path}: the file has no rows: write it again with at least one problem"


def no_column(path: str | Path, key: str, columns: list[str]) -> str:
    """Return the message that a file has no column of prompts."""
    return (
        f"{path}: there is no column {key!r} (data.prompt_key); the columns are {', '.join(columns)}: set "
        f"data.prompt_key to the column with the messages, or write that column; {HELP}"
    )


def unreadable(path: Path, error: Exception) -> str:
    """Return a message of one line why a file cannot be read.

    For JSON the message names the first bad line; otherwise it contains `error`.
    """
    if path.suffix in ENDINGS and not path.stat().st_size:
        return no_rows(path)
    fault = ""
    with suppress(OSError):  # `error` is then reported
        fault = _json_fault(path) if path.suffix != ".parquet" else ""
    if fault:
        return f"{path}: not readable as JSON: {fault}"
    cause = error.__cause__ or error
    text = first_line(cause)
    if "no data" in text:
        return no_rows(path)
    if "does not have a datasets dtype equivalent" in text:
        return f"{path}: verl cannot read a column of this type ({text[:200]}): cast it to a plain list; {HELP}"
    kind = "parquet" if path.suffix == ".parquet" else "JSON"
    return f"{path}: not a readable {kind} file ({type(cause).__name__}: {text[:200]}): write it again"


def _json_fault(path: Path) -> str:
    """Describe the first line that is not JSON; "" if all lines are, or if the whole file is one document."""
    with path.open("rb") as file:
        array = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        if array or path.suffix == ".json":
            file.seek(0)
            if not (fault := _fault_in(file.read(), 0)) or array:
                return fault
        file.seek(0)
        faults = (_fault_in(line, before) for before, line in enumerate(file) if line.strip())
        return next(filter(None, faults), "")


def _fault_in(content: bytes, before: int) -> str:
    """Describe where a file's `content`, which follows `before` lines, is not JSON; "" if it is."""
    try:
        json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return f"line {before + 1}: it is not UTF-8; write the file in UTF-8"
    except json.JSONDecodeError as error:
        return f"line {before + error.lineno}, column {error.colno}: {error.msg}"
    return ""


def check_truths(path: str | Path) -> None:
    """Check that the rule for GSM8K's format can judge every row: each `reward_model.ground_truth` must be a number.

    Raises:
        DataError: a row has no number; the message names the first such row.
    """
    import datasets

    rows = read_file(path)
    kind = rows.features.get("reward_model")
    inner = kind.get("ground_truth") if isinstance(kind, dict) else None
    if kind is None:
        check_told(dict.fromkeys(["data_source", *rows.column_names]), f"{path}: row 0")
    # a column of several types, or of lists and structs: check the values as verl decodes them
    if not isinstance(inner, datasets.Value):
        check_values((_truth_in(row) for row in rows.select_columns(["reward_model"])), path)
        return
    column = pc.struct_field(rows.data["reward_model"].combine_chunks(), "ground_truth")
    # In 32 bits, 1/3 is a different number than in 64 bits, and no response would equal it.
    rounded = inner.dtype if inner.dtype in ("float16", "float32") else ""
    if not all(_is_truth(value, rounded) for value in column.unique().to_pylist()):
        check_values(column.to_pylist(), path, rounded)


def check_values(truths: Any, where: str | Path, rounded: str = "") -> None:
    """Check that every one of `truths`, in the order of the rows, is a number that the GSM8K rule can judge.

    `rounded`: the type of floating-point numbers if it is less precise than Python's float. `where`: the file, for the
    error message.

    Raises:
        DataError: a value is not such a number; the message names the first such row.
    """
    for place, truth in enumerate(truths):
        if not _is_truth(truth, rounded):
            shown = "null" if truth is None else f"{truth!r} of {rounded}" if rounded else repr(truth)
            raise DataError(
                f"{where}: row {place} (counted from 0) has the ground truth {shown}, which the rule "
                "verl_aqn.tasks.gsm8k cannot judge because it compares numbers: correct the row, or set "
                "reward.custom_reward_function.path to your own reward, such as one that calls math-verify"
            )


def check_told(item: dict, where: str) -> None:
    """Check that an item has the fields that verl's reward managers read. Raises DataError."""
    if "data_source" not in item:
        raise DataError(
            f"{where} has no data_source (the name of its data set), which verl passes to the reward; {HELP}"
        )
    block = item.get("reward_model")
    if not isinstance(block, dict) or "ground_truth" not in block:
        kind = "is missing" if block is None else f"has no ground_truth but {str(block)[:60]!r}"
        raise DataError(
            f"{where}: the column 'reward_model' {kind}: write "
            f'{{"style": "rule", "ground_truth": the right answer}} into it, which verl tells the reward; {HELP}'
        )


def _truth_in(row: dict) -> object:
    block = row["reward_model"]
    return block.get("ground_truth") if isinstance(block, dict) else None


def _is_truth(value: object, rounded: str) -> bool:
    found = number(value)
    return found is not None and not (rounded and found % 1)


def sources_of(path: str | Path) -> set[Any]:
    """Return the `data_source` of every row: the data sets that a file was made of.

    Empty if there is no such column.
    """
    rows = read_file(path)
    return set(rows["data_source"]) if "data_source" in rows.column_names else set()


@contextmanager
def _silent() -> Iterator[None]:
    """Disable the progress bars of `datasets`, and the error that it logs in addition to raising it."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
