"""Read the first rows of a run's data with verl's data set class, or the user's own, before anything is started.

`python -m verl_aqn.integrations.verl.first_rows` reads a recipe's config from standard input; the last line of standard
output is the answer as JSON (`verl_aqn.preflight.data_rows`). A fault is reported in one line.
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
from verl_aqn.integrations.verl.left_out_rows import UNFILTERED, rows_of, told_rows
from verl_aqn.integrations.verl.rendering import NotRendered, Template, fault_of, remedy
from verl_aqn.integrations.verl.verls_reward import check_verls_reward, judges
from verl_aqn.preflight.run_data import KEYS, LIMITS, has_own_class, needs_truth
from verl_aqn.tasks.data_files import check_name, check_told, no_column, no_rows, unreadable

FIRST = 8
"""How many rows of each file are checked; if verl would leave out all of these, the whole file is checked."""


def answer(config: DictConfig) -> dict[str, Any]:
    """Return the result of the check as plain values.

    `rows`: how many rows a user's own class has in each set (None for verl's class, which has the rows of the files),
    and `warnings`. If a check fails: `fault`, in one line, and `kind`, the name of the error's class.
    """
    try:
        look = FirstRows(config)
        rows = {part: look.check(part) for part in KEYS}
    except AqnError as error:
        return {"fault": str(error), "kind": type(error).__name__}
    return {"rows": rows if look.own else None, "warnings": look.warnings}


def own_items(config: DictConfig, part: str) -> Any:
    """Return the user's own data set for a set (train or test), without leaving out long prompts.

    Raises:
        DataError, ConfigError, ModelError: as `FirstRows` and `FirstRows.read`.
    """
    look = FirstRows(config)
    files, name = look.files(part)
    return look.read(files, name, int(config.data.get(LIMITS[part], -1)))[0]


class FirstRows:
    """Checks of the first rows of a recipe's data with its data set class and chat template.

    `config.data` names files, and `actor_rollout_ref.model.path` (or `tokenizer_path`) a folder with a tokenizer.

    Raises:
        ModelError: as `Template`.
        ConfigError: the user's own class cannot be loaded.
    """

    def __init__(self, config: DictConfig) -> None:
        self.config, self.data, self.own = config, config.data, has_own_class(config)
        self.warnings: list[str] = []
        self.key = str(self.data.get("prompt_key", "prompt"))
        self.template = Template(config)
        # A user's own agent loop may use a prompt in any way, so rendering is not checked then.
        self.renders = OmegaConf.select(config, "actor_rollout_ref.rollout.agent.agent_loop_config_path") is None
        if self.renders:
            self.template.check()
        try:
            self.cls: Any = get_dataset_class(self.data)
        except (Exception, SystemExit) as error:  # the user's module may raise any error during its import
            named = self.data.custom_cls
            raise ConfigError(
                f"data.custom_cls: {named.name} of {named.path} cannot be loaded: {first_line(error)}"
            ) from error

    def check(self, part: str) -> int:
        """Check the first rows of each file of a set, or of the whole set if the user's own class reads the files.

        Returns:
            The number of rows in the user's own data set, or 0 for verl's class.

        Raises:
            DataError: a row is wrong; the message names the row and the fault.
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
            # verl joins the files, so a column of another file exists here too, with null in it.
            items = [dict.fromkeys(columns) | item for item in items]
            left_out += [text] if (text := self.check_rows(dataset, items, [file], limit)) else []
        if len(left_out) == len(files):
            raise DataError(left_out[0])
        self.warnings += left_out
        return 0

    def files(self, part: str) -> tuple[list[str], str]:
        """Return the files of a set, and the config key that names them."""
        value = self.data[KEYS[part]]
        return [value] if isinstance(value, str) else list(value), f"data.{KEYS[part]}"

    def dataset(self, files: Sequence[str], rows: int, *, filtered: bool, cls: Any = None) -> Any:
        """Return the class's data set of the first `rows` rows (-1: all).

        `filtered`: whether long prompts are left out if the recipe says so.
        """
        data = self.data.copy()
        with open_dict(data):
            data.shuffle = False
            if not filtered:
                data.filter_overlong_prompts = False
            if rows == FIRST or data.get("filter_overlong_prompts_workers") == 1:
                data.filter_overlong_prompts_workers = None  # starting a pool for one process takes seconds
        return (cls or self.cls)(
            data_files=ListConfig(list(files)),
            tokenizer=self.template.tokenizer,
            processor=self.template.processor,
            config=data,
            max_samples=rows,
        )

    def read(self, files: Sequence[str], where: str, rows: int) -> tuple[Any, list[dict]]:
        """Return the data set, without leaving anything out, and its first items."""
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
                items.append(row | {"raw_prompt": row[self.key]})  # for example null, a row that verl may leave out
        return dataset, items

    def _own_raises(self, error: Exception) -> str:
        return f"the class {self.cls.__name__} of data.custom_cls raises {type(error).__name__} ({first_line(error)})"

    def join(self, files: Sequence[str], name: str, sets: Sequence[Any]) -> list[str]:
        """Return the columns of a set's files after joining them as verl does; raise DataError if verl cannot."""
        try:
            return list(self.dataset(files, 1, filtered=False).dataframe.column_names)
        except Exception as error:
            kinds = sets[0].dataframe.features
            for file, other in zip(files, sets, strict=True):
                for column, kind in other.dataframe.features.items():
                    if column in kinds and kind != kinds[column]:
                        raise DataError(
                            f"{name}: verl cannot join its files: the column {column!r} is {_short(kind)} in {file}, "
                            f"but {_short(kinds[column])} in {files[0]}: write both with the same type"
                        ) from error
            raise DataError(f"{name}: verl cannot join its files: {first_line(error)[:200]}") from error

    def check_rows(self, dataset: Any, items: list[dict], files: Sequence[str], limit: int) -> str:
        """Check that the first items have the fields that the reward needs, and can be rendered.

        Returns:
            The reason why no row is left, or "" if rows are left.

        Raises:
            DataError: a row fails the check, and the class does not leave it out.
            ConfigError: the recipe names no reward function, and verl's own cannot judge the rows.
        """
        where = files[0] if len(files) == 1 else ", ".join(Path(file).name for file in files)
        if needs_truth(self.config):
            for place, item in enumerate(items):
                check_told(item, f"{where}: row {place}")
        if judges(self.config):
            check_verls_reward(items[0], f"{where}: row 0")
        if not self.renders:
            return ""
        failed, long = self._render(items, where, getattr(dataset, "tool_schemas", None))
        if not failed and not long:
            return ""
        kept = len(self.dataset(files, limit if self.own else FIRST, filtered=True))
        stay = len(failed) + len(long) - (len(dataset) - kept)  # the bad rows that are not left out
        first = min(failed | long)
        why, do = f"row {first}: {(failed | long)[first]}", remedy(failed.values())
        if failed and stay > len(long):
            raise DataError(f"{where}: row {min(failed)} cannot be rendered ({failed[min(failed)]}): {do}")
        if kept and stay > 0 and not self.own and self.data.get("truncation") == "error":
            raise DataError(f"{where}: {why}: {UNFILTERED}")
        if kept and stay > 0:
            self.warnings.append(f"{where}: the beginning of long prompts is cut off ({why}): {do}")
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
        """Return the items that cannot be rendered, and those that are too long, each as {place: reason}."""
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
    """Return whether every prompt of the file is plain text, by the type of the column."""
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
