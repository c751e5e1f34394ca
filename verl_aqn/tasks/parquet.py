"""Write parquet files for verl's data set; `verl_aqn.tasks.data_files` reads them."""

import filecmp
import os
import uuid
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from verl_aqn.errors import DataError, EnvironmentFault, reason, remedy

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
    """One message of a prompt."""

    role: str
    content: str


def row(source: str, prompt: list[Message], truth: str, *, split: str, index: int, question: str, answer: str) -> dict:
    """Return one row of `SCHEMA`: a problem whose answer is checked by a rule against `truth`."""
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer},
    }


def write_parquet(rows: list[dict], path: str | Path) -> Path:
    """Write `rows` to `path`, completely or not at all: to a temporary file first, which is then renamed.

    A file that already has the same bytes is left as it is, so that answers about it, which are stored by its time of
    change, stay valid.

    Raises:
        DataError: there are no rows.
        EnvironmentFault: the folder cannot be created or written.
    """
    path = Path(path)
    if not rows:
        raise DataError(f"{path}: there are no rows to write: ask for at least one problem")
    working = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), working)
            if path.is_symlink() or not path.is_file() or not filecmp.cmp(working, path, shallow=False):
                os.replace(working, path)
        finally:
            working.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be written ({reason(error)}): {remedy(error) or 'choose another folder'}"
        ) from error
    return path
