"""Prepare a run's data: put files on disk, let verl read them before anything is started, and give their rows."""

import importlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from verl_aqn.cache import cache_dir
from verl_aqn.errors import ConfigError, DataError
from verl_aqn.preflight import data_rows as preflight_rows
from verl_aqn.preflight.agent_tools import find_tools, prepare_tools
from verl_aqn.preflight.prepare import check_steps, find_model
from verl_aqn.preflight.reward_function import check_reward, is_ours
from verl_aqn.tasks.data_files import (
    check_there,
    check_told,
    check_truths,
    check_values,
    count_rows,
    no_column,
    read_file,
)

# Rows of the embedded task; a recipe uses as many as its steps need.
N_TRAIN, N_TEST = 2048, 384
MADE = ("embedded", "embedded_2", "embedded_3", "embedded_tool")  # values of data.*_files that are generated
KEYS = {"train": "train_files", "test": "val_files"}
LIMITS = {"train": "train_max_samples", "test": "val_max_samples"}


class Items(Protocol):
    """A data set of a run, with an item for each row."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Data:
    """Facts about the data. `rows`: number by set (train, test), at most max_samples. `warnings`: one line each."""

    rows: dict[str, int]
    warnings: list[str]


def prepare_data(config: DictConfig) -> Data:
    """Make `data.train_files` and `data.val_files` files on disk, and let verl read and render their first rows.

    Raises:
        DataError: a file is missing, or verl cannot read it; verl cannot render a row and does not skip it; the rule
            for GSM8K's format is the reward and cannot judge a ground truth.
        ModelError: the tokenizer has no chat template.
        ConfigError: a user's own reward function raises, or does not return the accuracy (`check_reward`).
    """
    from verl_aqn.tasks.multi_step import prepare_multi_step
    from verl_aqn.tasks.word_problems import prepare_word_problems

    makers = {
        "embedded": lambda: prepare_word_problems(made_folder("embedded"), N_TRAIN, N_TEST),
        "embedded_2": lambda: prepare_multi_step(made_folder("embedded_2"), N_TRAIN, N_TEST, steps=2),
        "embedded_3": lambda: prepare_multi_step(made_folder("embedded_3"), N_TRAIN, N_TEST, steps=3),
        "embedded_tool": lambda: prepare_word_problems(made_folder("embedded_tool"), N_TRAIN, N_TEST, tool=True),
        "gsm8k": _gsm8k,
    }
    for split, key in KEYS.items():
        value = config.data[key]
        if isinstance(value, str) and value in makers:
            config.data[key] = str(makers[value]()[split])
        files = [str(file.absolute()) for file in data_files(config, key)]
        config.data[key] = files[0] if len(files) == 1 and isinstance(value, str) else files
    found = check_data(config)
    sets = sets_of(config)
    prepare_tools(config, *sets.values())
    for item, where in first_items(config, sets):
        check_reward(config, item, where)
    return found


def check_data(config: DictConfig) -> Data:
    """Let verl read and render the first rows of the files in `config`, and check every ground truth.

    Raises:
        DataError, ModelError, ConfigError: as in `prepare_data`.
    """
    find_tools(config)
    own = has_own_class(config)
    counts = dict.fromkeys(KEYS, 0)
    for split, key in KEYS.items():
        for file in data_files(config, key):
            if own:
                check_there(file)
            else:
                counts[split] += count_rows(file)
    answer: dict[str, Any] = {"rows": None, "warnings": []}
    if preflight_rows.is_here():
        folder = find_model(config, weights=False)
        answer = preflight_rows.ask(config, folder, data_files(config), own=own)
    for split, key in LIMITS.items():
        if (limit := config.data[key]) > 0:
            counts[split] = min(counts[split], limit)
    check_truths_of(config)
    return Data(answer["rows"] or counts, answer["warnings"])


def check_truths_of(config: DictConfig) -> None:
    """Check every ground truth of both sets if the reward is the rule for GSM8K's format. Raises DataError."""
    if not is_ours(config):
        return
    for split, key in KEYS.items():
        if has_own_class(config):
            items = items_of(config, split)
            truths = (items[place]["reward_model"]["ground_truth"] for place in range(len(items)))
            check_values(truths, f"data.{key}")
            continue
        for file in data_files(config, key):
            check_truths(file)


def sets_of(config: DictConfig) -> dict[str, "Items"]:
    """Return the items of both sets (`items_of`) by their names, train and test."""
    return {split: items_of(config, split) for split in KEYS}


def first_items(config: DictConfig, sets: Mapping[str, "Items"]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the first item of every file and its place, validation first; for a user's own class, one item per set.

    Args:
        sets: as `sets_of` returns them.

    Raises:
        DataError: an item lacks what verl passes to the reward.
    """
    for split in ("test", "train"):
        items, files = sets[split], data_files(config, KEYS[split])
        places = [0, *itertools.accumulate(map(count_rows, files[:-1]))] if not has_own_class(config) else [0]
        for place, file in zip(places, files, strict=False):
            item = items[place]
            if needs_truth(config):
                check_told(item, f"{file}: row 0")
            yield item, f"row 0 of {file}"


def items_of(config: DictConfig, split: str) -> "Items":
    """Return all items of a set (train or test) as verl's data set gives them, in the order of the files.

    In addition to the file's columns, an item has `raw_prompt`, its messages, and `extra_info`.

    Raises:
        DataError, ConfigError: a file, or the user's own class, gives no items.
    """
    if has_own_class(config):
        # By name: what imports verl stands above this room, and takes seconds to import.
        own_items = importlib.import_module("verl_aqn.integrations.verl.first_rows").own_items

        with redirect_stdout(sys.stderr):  # verl and the class may print, but standard output is for results
            return own_items(preflight_rows.with_model(config, find_model(config, weights=False)), split)
    return _TextItems(config, split)


class _TextItems:
    """The items of `RLHFDataset` for text, without importing verl."""

    def __init__(self, config: DictConfig, split: str) -> None:
        import datasets

        self.key = config.data.prompt_key
        self.rows = datasets.concatenate_datasets([read_file(file) for file in data_files(config, KEYS[split])])
        if self.key not in self.rows.column_names:
            raise DataError(no_column(data_files(config, KEYS[split])[0], self.key, self.rows.column_names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self.rows[place]
        return row | {"raw_prompt": row[self.key], "extra_info": row.get("extra_info") or {}}


def has_own_class(config: DictConfig) -> bool:
    """Return whether the recipe names a user's own data set class, which may change the rows of the files freely."""
    return OmegaConf.select(config, "data.custom_cls.path") is not None


def needs_truth(config: DictConfig) -> bool:
    """Return whether verl's reward managers judge the responses; all of them read a ground truth from the data.

    A user's own manager may not, and a reward model without a reward function does not.
    """
    reward = config.reward
    manager, model = (OmegaConf.select(reward, key) for key in ("reward_manager.source", "reward_model.enable"))
    return manager in (None, "register") and bool(reward.custom_reward_function.path or not model)


def made_folder(name: str) -> Path:
    """Return the cache folder for the data that a recipe calls `name`: one of `MADE`, or gsm8k."""
    folder = f"{name.replace('embedded', 'word_problems')}-{N_TRAIN}-{N_TEST}" if name in MADE else name
    return cache_dir() / "data" / folder


def _gsm8k() -> dict[str, Path]:
    """Return GSM8K from the cache, where `verl-aqn data gsm8k` also puts it, or download it from the hub."""
    from verl_aqn.tasks.gsm8k_data import prepare_gsm8k

    folder = made_folder("gsm8k")
    made = {split: folder / f"{split}.parquet" for split in ("train", "test")}
    return made if all(file.is_file() for file in made.values()) else prepare_gsm8k(folder)


def data_files(config: DictConfig, *keys: str) -> list[Path]:
    """Return the files of `data.train_files` and `data.val_files`, or of `keys`.

    Each value is a path, a list of paths, or the text of such a list, as in verl's example scripts ("['a.parquet',
    'b.jsonl']").

    Raises:
        ConfigError: the value is none of these.
    """
    return [Path(f).expanduser() for key in keys or ("train_files", "val_files") for f in _names_of(config, key)]


def _names_of(config: DictConfig, key: str) -> list[str]:
    value = config.data[key]
    names = value
    if isinstance(value, str):
        names = _listed(value) if value.lstrip().startswith("[") and not os.path.exists(value) else [value]
    names = list(names or ())
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"data.{key}={value}: give a file, a list of files, embedded, or gsm8k")
    return names


def _listed(text: str) -> list[Any]:
    try:
        return list(OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]
    except Exception:  # raised by YAML's parser
        return []


def steps_in_data(config: DictConfig) -> int | None:
    """Return the RL steps of a recipe according to its data, or None if they are unknown.

    They are unknown if the data are not on disk (nothing is created or downloaded), or if a user's own data set class
    decides the number of rows.
    """
    value = config.data.train_files
    if value in MADE:
        rows = N_TRAIN
    else:
        files = files_on_disk(config, "train_files")
        if files is None or has_own_class(config):
            return None
        rows = sum(map(count_rows, files))
    limit = config.data.train_max_samples
    return check_steps(config, min(rows, limit) if limit > 0 else rows)


def files_on_disk(config: DictConfig, key: str) -> list[Path] | None:
    """Return the files of a set as a run would use them, or None if some are missing.

    Nothing is created or downloaded.
    """
    names = {"train_files": "train.parquet", "val_files": "test.parquet"}
    short = {name: made_folder(name) / names[key] for name in ("gsm8k", *MADE)}
    files = [short.get(name, Path(name).expanduser()) for name in _names_of(config, key)]
    return files if all(file.is_file() for file in files) else None
