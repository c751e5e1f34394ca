"""Ask verl's data set class, or the user's own, for the first rows of a run's data, before anything is started.

`python -m verl_aqn.integrations.verl.first_rows` reads a recipe's config from standard input; the last line of standard output
is the answer as JSON (`verl_aqn.preflight.data_rows`). What the class reads is right; what it does not is told in one line.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from verl.utils.dataset.rl_dataset import get_dataset_class

from verl_aqn.errors import AqnError, ConfigError, DataError, first_line
from verl_aqn.integrations.verl.left_out_rows import rows_of, told_rows
from verl_aqn.integrations.verl.rendering import NotRendered, Template, fault_of, remedy
from verl_aqn.preflight.run_data import KEYS, LIMITS, has_own_class, needs_truth
from verl_aqn.tasks.data_files import check_name, check_told, no_column, no_rows, unreadable

FIRST = 8
"""Rows of each file that are looked at; all of a file's where verl would leave these out."""


def answer(config: DictConfig) -> dict[str, Any]:
    """Return `rows`, how many a class of the user's own has of each set (None: verl's class, whose rows are those of
    the files), and `warnings`; or `fault`, what is wrong in one line, with `kind`, the name of its class of error.
    """
    try:
        look = FirstRows(config)
        rows = {part: look.check(part) for part in KEYS}
    except AqnError as error:
        return {"fault": str(error), "kind": type(error).__name__}
    return {"rows": rows if look.own else None, "warnings": look.warnings}


def own_items(config: DictConfig, part: str) -> Any:
    """Return the data set of the user's own class for a set (train or test), of which nothing is left out for its
    length. Raises as `FirstRows` and its `read`.
    """
    look = FirstRows(config)
    files, name = look.files(part)
    return look.read(files, name, int(config.data.get(LIMITS[part], -1)))[0]


class FirstRows:
    """What a recipe's data set class and chat template do with the first rows of its data.

    `config.data` names files, and `actor_rollout_ref.model.path` (or `tokenizer_path`) a folder with a tokenizer.

    Raises:
        ModelError: as `Template`.
        ConfigError: a class of the user's own that cannot be loaded.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config, self.data, self.own = config, config.data, has_own_class(config)
        self.warnings: list[str] = []
        self.key = str(self.data.get("prompt_key", "prompt"))
        self.template = Template(config)
        # An agent loop of the user's own may make of a prompt what it likes.
        self.renders = OmegaConf.select(config, "actor_rollout_ref.rollout.agent.agent_loop_config_path") is None
        if self.renders:
            self.template.check()
        try:
            self.cls: Any = get_dataset_class(self.data)
        except Exception as error:  # whatever the user's module does as it is imported
            named = self.data.custom_cls
            raise ConfigError(
                f"data.custom_cls: {named.name} of {named.path} cannot be loaded: {first_line(error)}"
            ) from error

    def check(self, part: str) -> int:
        """Check the first rows of each file of a set; of a class of the user's own, which may take its files as it
        likes, those of the whole set. Returns the number of rows of such a class.

        Raises:
            DataError: what is wrong with which row.
        """
        files, name = self.files(part)
        limit = int(self.data.get(LIMITS[part], -1))
        if self.own:
            dataset, items = self.read(files, name, limit)
            if text := self.check_rows(dataset, items, files, limit):
                raise DataError(text)
            return len(dataset)
        for file in files:
            check_name(Path(file))
        read = [self.read([file], file, FIRST) for file in files]
        columns = self.join(files, name, [dataset for dataset, _ in read])
        left_out = []
        for file, (dataset, items) in zip(files, read, strict=True):
            # A column that another file has is here too, and holds nothing.
            items = [dict.fromkeys(columns) | item for item in items]
            left_out += [text] if (text := self.check_rows(dataset, items, [file], limit)) else []
        if len(left_out) == len(files):
            raise DataError(left_out[0])
        self.warnings += left_out
        return 0

    def files(self, part: str) -> tuple[list[str], str]:
        """The files of a set, and the key that names them."""
        value = self.data[KEYS[part]]
        return [value] if isinstance(value, str) else list(value), f"data.{KEYS[part]}"

    def dataset(self, files: Sequence[str], rows: int, *, filtered: bool, cls: Any = None) -> Any:
        """The class's data set of the first `rows` of files (-1: of all), filtered as the recipe has it, or not."""
        data = self.data.copy()
        with open_dict(data):
            data.shuffle = False
            if not filtered:
                data.filter_overlong_prompts = False
            if rows == FIRST or data.get("filter_overlong_prompts_workers") == 1:
                data.filter_overlong_prompts_workers = None  # a pool of one process takes seconds to start
        return (cls or self.cls)(
            data_files=ListConfig(list(files)),
            tokenizer=self.template.tokenizer,
            processor=self.template.processor,
            config=data,
            max_samples=rows,
        )

    def read(self, files: Sequence[str], where: str, rows: int) -> tuple[Any, list[dict]]:
        """Return the data set, of which nothing is left out, and its first items."""
        try:
            dataset = self.dataset(files, rows, filtered=False)
            size = len(dataset)
        except Exception as error:
            if not self.own:
                raise DataError(unreadable(Path(files[0]), error)) from error
            raise DataError(f"{where}: {self._own_raises(error)}") from error
        if not size:
            raise DataError(no_rows(where))
        items = []
        for place in range(min(size, FIRST)):
            try:
                items.append(dict(dataset[place]))
            except Exception as error:
                if self.own:
                    raise DataError(f"{where}: row {place}: {self._own_raises(error)}") from error
                row = dict(dataset.dataframe[place])
                if self.key not in row:
                    raise DataError(no_column(where, self.key, list(row))) from error
                items.append(row | {"raw_prompt": row[self.key]})  # null, for example, which verl may leave out
        return dataset, items

    def _own_raises(self, error: Exception) -> str:
        return f"the class {self.cls.__name__} of data.custom_cls raises {type(error).__name__} ({first_line(error)})"

    def join(self, files: Sequence[str], name: str, sets: Sequence[Any]) -> list[str]:
        """Return the columns of a set's files taken together, as verl does that; raises DataError if it cannot."""
        try:
            return list(self.dataset(files, 1, filtered=False).dataframe.column_names)
        except Exception as error:
            kinds = sets[0].dataframe.features
            for file, other in zip(files, sets, strict=True):
                for column, kind in other.dataframe.features.items():
                    if column in kinds and kind != kinds[column]:
                        raise DataError(
                            f"{name}: verl cannot join its files: the column {column!r} is {_short(kind)} in {file}, "
                            f"but {_short(kinds[column])} in {files[0]}: write both with one type"
                        ) from error
            raise DataError(f"{name}: verl cannot join its files: {first_line(error)[:200]}") from error

    def check_rows(self, dataset: Any, items: list[dict], files: Sequence[str], limit: int) -> str:
        """Check that the first items have what a reward is given, and can be rendered. Returns why no row at all is
        left, or "".

        Raises:
            DataError: a row for which that is not so, and which the class does not leave out.
        """
        where = files[0] if len(files) == 1 else ", ".join(Path(file).name for file in files)
        if needs_truth(self.config):
            for place, item in enumerate(items):
                check_told(item, f"{where}: row {place}")
        if not self.renders:
            return ""
        failed, long = self._render(items, where, getattr(dataset, "tool_schemas", None))
        if not failed and not long:
            return ""
        kept = len(self.dataset(files, limit if self.own else FIRST, filtered=True))
        stay = len(failed) + len(long) - (len(dataset) - kept)  # of the bad rows
        first = min(failed | long)
        why, do = f"row {first}: {(failed | long)[first]}", remedy(failed.values())
        if failed and stay > len(long):
            raise DataError(f"{where}: row {min(failed)} cannot be rendered ({failed[min(failed)]}): {do}")
        if kept and stay > 0:
            self.warnings.append(f"{where}: the beginning of long prompts is cut ({why}): {do}")
        elif kept:
            self.warnings.append(f"{where}: rows are left out ({why}): {do}")
        elif self.own or _is_text(dataset, self.key):
            return f"{where}: no row is left ({why}): {do}"
        else:
            with told_rows(self.config):
                whole = self.dataset(files, limit, filtered=True, cls=get_dataset_class(self.data))
            if not len(whole):
                return f"{where}: no row is left ({rows_of(whole, files).text}): {do}"
            self.warnings.append(f"{where}: the first {len(items)} rows are left out ({why}): {do}")
        return ""

    def _render(self, items: list[dict], where: str, tools: Any) -> tuple[dict[int, str], dict[int, str]]:
        """Return the items that cannot be rendered and those that are too long, each with the reason, by place."""
        failed: dict[int, str] = {}
        long: dict[int, str] = {}
        limit = int(self.data.get("max_prompt_length", 1024))
        for place, item in enumerate(items):
            messages: Any = item.get("raw_prompt")
            if fault := fault_of(messages, self.key):
                failed[place] = fault
                continue
            try:
                text = self.template.render(messages, tools)
            except NotRendered as error:
                failed[place] = str(error)
                continue
            if self.template.processor is None and (length := self.template.tokens(text)) > limit:
                long[place] = f"{length:,} tokens of at most {limit:,}"
            if lost := [one["role"] for one in messages if _is_lost(one, text)]:
                told = f"{where}: the chat template of {self.template.name} drops the text of the {lost[0]} turn"
                if told not in self.warnings:
                    self.warnings.append(told)
        return failed, long


def _is_text(dataset: Any, key: str) -> bool:
    """Whether every prompt of the file is text, by the type of the column."""
    return dataset.dataframe.features[key] == datasets.Value("string")


def _is_lost(message: dict, text: str) -> bool:
    content = message.get("content")
    if message.get("role") not in ("system", "user") or not isinstance(content, str):
        return False
    return content.strip() not in text


def _short(kind: Any) -> str:
    return " ".join(str(kind).split())[:80]


def main() -> None:
    config = OmegaConf.create(sys.stdin.read())
    assert isinstance(config, DictConfig)
    print(json.dumps(answer(config)), flush=True)


if __name__ == "__main__":
    main()
