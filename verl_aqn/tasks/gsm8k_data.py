"""Convert GSM8K (Cobbe et al. 2021, arXiv 2110.14168) to verl's parquet files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from verl_aqn.errors import DataError
from verl_aqn.tasks.gsm8k import number
from verl_aqn.tasks.parquet import Message, row, write_parquet

SOURCE = "openai/gsm8k"
# verl's own wording (examples/data_preprocess/gsm8k.py), so that scores compare with other runs of verl.
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_LAYOUTS = ("{split}.jsonl", "{split}.parquet", "{split}-*.parquet", "main/{split}-*.parquet")


def prepare_gsm8k(dst: str | Path, source: str | Path | None = None) -> dict[str, Path]:
    """Write `train.parquet` and `test.parquet` to `dst`, and return {"train": path, "test": path}.

    `source` is a folder with train.jsonl and test.jsonl (or the parquet files of a hub snapshot); None downloads from
    the hub.

    Raises:
        DataError: the source cannot be read, or a row has no question or no "#### N".
    """
    paths = {}
    for split in ("train", "test"):
        rows = []
        for index, item in enumerate(_load(split, source)):
            where = f"GSM8K {split} row {index}"
            item = item if isinstance(item, dict) else {}  # a line may hold any JSON, such as a whole array
            question, answer = item.get("question"), item.get("answer")
            if not isinstance(question, str) or not isinstance(answer, str):
                raise DataError(f"{where}: 'question' or 'answer' is missing: download the data set again")
            prompt: list[Message] = [{"role": "user", "content": f"{question} {INSTRUCTION}"}]
            truth = ground_truth(answer, where)
            rows.append(row(SOURCE, prompt, truth, split=split, index=index, question=question, answer=answer))
        paths[split] = write_parquet(rows, Path(dst) / f"{split}.parquet")
    return paths


def ground_truth(answer: str, where: str) -> str:
    """Return the N of a solution's last "#### N", without commas: "1,234" gives "1234".

    `where` names the row in the error message.
    """
    _, mark, truth = answer.rpartition("#### ")
    truth = truth.strip()
    if not mark or number(truth) is None:
        raise DataError(f"{where}: the answer does not end in '#### N': download the data set again")
    return truth.replace(",", "")


def _load(split: str, source: str | Path | None) -> Iterable[Any]:
    if source is None:
        import datasets  # takes seconds to import, and only this branch needs it

        try:
            return datasets.load_dataset(SOURCE, "main", split=split)
        except OSError as error:  # raised without a network, and for a data set that does not exist
            if error.filename:  # a fault of the local cache
                raise
            raise DataError(
                f"{SOURCE} cannot be downloaded from the hub ({type(error).__name__}): prepare it from a folder "
                "with train.jsonl and test.jsonl, by `verl-aqn data gsm8k --source FOLDER`"
            ) from error
    for layout in _LAYOUTS:
        files = sorted(Path(source).glob(layout.format(split=split)))
        if files:
            if not (items := [item for file in files for item in _read(file)]):
                raise DataError(f"{', '.join(map(str, files))}: no rows: give a folder that contains GSM8K")
            return items
    raise DataError(f"{source}: no {split}.jsonl and no {split} parquet file: give a folder that contains GSM8K")


def _read(file: Path) -> list[Any]:
    try:
        if file.suffix == ".parquet":
            return pq.read_table(file).to_pylist()
        with file.open(encoding="utf-8") as lines:  # not splitlines: a question may contain U+2028
            return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and ArrowInvalid
        raise DataError(f"{file}: not readable ({type(error).__name__}): download the data set again") from error
