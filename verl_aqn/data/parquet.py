"""The parquet files that verl's RL data set reads: how they are written and checked."""

import os
import uuid
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl_aqn.errors import DataError, EnvironmentFault, reason, remedy
from verl_aqn.rewards.gsm8k import number

TRUTH = "ground_truth"

SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(
            {"split": pa.string(), "index": pa.int64(), "question": pa.string(), "answer": pa.string()}
        ),
    }
)


class Message(TypedDict):
    """One turn of a prompt."""

    role: str
    content: str


def row(source: str, prompt: list[Message], truth: str, *, split: str, index: int, question: str, answer: str) -> dict:
    """One row of `SCHEMA`: a problem whose answer is checked by a rule against `truth`."""
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer},
    }


def write_parquet(rows: list[dict], path: str | Path) -> Path:
    """Write `rows` to `path`, whole or not at all: beside it first, then one rename.

    Raises:
        DataError: there are no rows.
        EnvironmentFault: the folder cannot be made or written.
    """
    path = Path(path)
    if not rows:
        raise DataError(f"{path}: no rows to write: ask for at least one problem")
    working = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), working)
            os.replace(working, path)
        finally:
            working.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be written ({reason(error)}): {remedy(error) or 'choose another folder'}"
        ) from error
    return path


def check_parquet(path: str | Path) -> int:
    """Number of rows of a file that verl can train on; reads the footer only.

    Raises:
        DataError: the file is missing, is no parquet file, is empty, or lacks a column or a field of one.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file: prepare the data or correct the path")
    try:
        meta = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: write it again") from error
    found = _names(meta.schema.to_arrow_schema())
    for name in ("data_source", "prompt.role", "prompt.content", "reward_model.ground_truth", "extra_info"):
        column = name.partition(".")[0]
        if column not in found:
            raise DataError(f"{path}: column {column!r} is missing: verl needs data_source, prompt, reward_model, ...")
        if name not in found:
            raise DataError(f"{path}: column {column!r} lacks the field {name!r}: write the file again")
    if meta.num_rows == 0:
        raise DataError(f"{path}: the file has no rows: write it again with at least one problem")
    return meta.num_rows


def check_truths(path: str | Path) -> None:
    """Check that the rule for GSM8K's form can judge every row: that `reward_model.ground_truth` is a number in each.

    Raises:
        DataError: a row has none, or something else; with the first such row.
    """
    column = pc.struct_field(pq.read_table(path, columns=["reward_model"])["reward_model"].combine_chunks(), TRUTH)
    # A third in 32 bits is another number than in 64, and no answer equals it.
    rounded = pa.types.is_float16(column.type) or pa.types.is_float32(column.type)
    try:
        values = column.unique().to_pylist()
    except pa.ArrowNotImplementedError:  # of lists and structs, which are no numbers
        values = column.to_pylist()
    if all(_is_truth(value, rounded) for value in values):
        return
    place, truth = next((n, one) for n, one in enumerate(column.to_pylist()) if not _is_truth(one, rounded))
    shown = "null" if truth is None else f"{truth!r} of {column.type}" if rounded else repr(truth)
    raise DataError(
        f"{path}: row {place} (counted from 0) has the ground truth {shown}, which the rule verl_aqn.rewards.gsm8k "
        "cannot judge, as it compares numbers: correct the row, or set reward.custom_reward_function.path to a reward "
        "of your own, such as one that calls math-verify"
    )


def _is_truth(value: object, rounded: bool) -> bool:
    found = number(value)
    return found is not None and not (rounded and found % 1)


def first_row(path: str | Path) -> dict:
    """The first row of a file, as Python's own values. The file has one (`check_parquet`)."""
    return next(pq.ParquetFile(path).iter_batches(batch_size=1)).to_pylist()[0]


def sources_of(path: str | Path) -> set[str]:
    """The `data_source` of every row: the data sets that a file was made of."""
    return set(pq.read_table(path, columns=["data_source"])["data_source"].to_pylist())


def _names(schema: pa.Schema) -> set[str]:
    names = set(schema.names)
    for field in schema:
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(inner):
            names |= {f"{field.name}.{inner.field(i).name}" for i in range(inner.num_fields)}
    return names
