"""The first rows of a run's data, before Ray starts: accepted if verl can read them, otherwise rejected in one line."""

import json
import os
import random
import re
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets.fingerprint import generate_random_fingerprint
from omegaconf import OmegaConf
from verl.utils import hf_tokenizer
from verl.utils.dataset.rl_dataset import RLHFDataset

from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError, DataError, ModelError
from verl_aqn.integrations.verl.first_rows import answer
from verl_aqn.preflight import data_rows as rows
from verl_aqn.preflight import recipe_checks as checks
from verl_aqn.preflight.probe.probe_inputs import read_prompts
from verl_aqn.preflight.run_data import check_data, items_of, prepare_data
from verl_aqn.tasks.smollm2 import tiny_model

LIMIT = 64
REWARD = "def compute_score(**told):\n    return {'score': 0.5, 'acc': 0}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(model):
    return hf_tokenizer(str(model))


@pytest.fixture
def template(model, tmp_path):
    """`template(text)` → a model with this chat template, or without one."""

    def make(text: str | None):
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "chat_template.jinja").unlink()
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)
        return folder

    return make


def message(text="1 + 1?", role="user"):
    return {"role": role, "content": text}


def row(prompt=None, key="prompt", **changes):
    told = {"data_source": "mine", "reward_model": {"style": "rule", "ground_truth": "2"}}
    return {**told, key: [message()] if prompt is None else prompt, **changes}


def lines(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@cache
def composed():
    return load_recipe("e6a", ["profile=cpu", "data.filter_overlong_prompts_workers=null"])


def recipe(model, train, test=None, *more):
    """A recipe with these files; `more` are overrides as on the command line, but composed once for all tests."""
    config, files = composed().copy(), train if isinstance(train, list) else [train]
    settings = {
        "actor_rollout_ref.model.path": str(model),
        "data.max_prompt_length": LIMIT,
        "data.train_files": [str(file) for file in files],
        "data.val_files": str(test or files[0]),
    }
    for override in more:
        key, _, value = override.partition("=")
        settings[key] = yaml.safe_load(value)
    for key, value in settings.items():
        OmegaConf.update(config, key, value)
    return config


def fault(config, kind="DataError"):
    """Return the error as one line."""
    found = answer(config)
    assert found.get("kind") == kind, found
    assert "\n" not in found["fault"]
    return found["fault"]


# ---------------------------------------------------------------- what verl reads

GOOD = [message()], [message("Be short.", "system"), message()], [message(), message("2", "assistant"), message("Why?")]
BAD = [message("word " * LIMIT)], [], None, [message(role=None, text=None)]


def as_lists(prompts, make):
    """Return an Arrow column of messages with the list type that `make` gives, as pyarrow and polars write them."""
    return pa.array(prompts, make(pa.struct({"role": pa.large_string(), "content": pa.large_string()})))


FORMS = {
    "list": lambda path, rows, key: arrow(path, rows, key, pa.list_),
    "large_list": lambda path, rows, key: arrow(path, rows, key, pa.large_list),  # what polars writes
    "list_view": lambda path, rows, key: arrow(path, rows, key, pa.list_view),
    "large_list_view": lambda path, rows, key: arrow(path, rows, key, pa.large_list_view),
    "fixed_size_list": lambda path, rows, key: arrow(path, rows, key, lambda item: pa.list_(item, 1)),
    "dictionary": lambda path, rows, key: arrow(path, rows, key, pa.list_, encode=True),
    "pandas": lambda path, rows, key: pd.DataFrame(rows).to_parquet(path.with_suffix(".parquet")),
    "text": lambda path, rows, key: pq.write_table(
        pa.Table.from_pylist([one | {key: json.dumps(one[key])} for one in rows]), path.with_suffix(".parquet")
    ),
    "bytes": lambda path, rows, key: pq.write_table(
        pa.Table.from_pylist([one | {key: b"?"} for one in rows]), path.with_suffix(".parquet")
    ),
    "jsonl": lambda path, rows, key: lines(path.with_suffix(".jsonl"), rows),
    "lines as json": lambda path, rows, key: lines(path.with_suffix(".json"), rows),
    "array": lambda path, rows, key: path.with_suffix(".json").write_text(json.dumps(rows)),
    "array in lines": lambda path, rows, key: path.with_suffix(".json").write_text(json.dumps(rows, indent=1)),
    "array as jsonl": lambda path, rows, key: path.with_suffix(".jsonl").write_text(json.dumps(rows)),
    "array with a mark": lambda path, rows, key: path.with_suffix(".json").write_text(
        json.dumps(rows), encoding="utf-8-sig"
    ),
    "jsonl with a mark": lambda path, rows, key: path.with_suffix(".jsonl").write_text(
        "\n".join(map(json.dumps, rows)), encoding="utf-8-sig"
    ),
    "UTF-16": lambda path, rows, key: path.with_suffix(".jsonl").write_text(
        "\n".join(map(json.dumps, rows)), encoding="utf-16"
    ),
    "a bad line": lambda path, rows, key: path.with_suffix(".jsonl").write_text(
        "\n".join([*map(json.dumps, rows), "{and so on"])
    ),
    "within a key": lambda path, rows, key: path.with_suffix(".json").write_text(json.dumps({"data": rows})),
    "no rows": lambda path, rows, key: path.with_suffix(".json").write_text("[]"),
    "nothing": lambda path, rows, key: path.with_suffix(".parquet").write_bytes(b""),
    "csv": lambda path, rows, key: pd.DataFrame(rows).to_csv(path.with_suffix(".csv")),
    "capitals": lambda path, rows, key: pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".PARQUET")),
}


def arrow(path, rows, key, make, encode=False):
    prompts = [one[key] if one[key] is not None or make is not pa.list_view else [] for one in rows]
    if make(pa.int8()) == pa.list_(pa.int8(), 1):
        prompts = [(prompt or [message()])[-1:] for prompt in prompts]
    table = pa.Table.from_pylist([{name: value for name, value in one.items() if name != key} for one in rows])
    if encode:
        table = table.set_column(0, "data_source", table["data_source"].dictionary_encode())
    pq.write_table(table.append_column(key, as_lists(prompts, make)), path.with_suffix(".parquet"))


def verl_reads(file, config, tokenizer):
    """Return whether verl's own class keeps a row that is a list of messages."""
    try:
        dataset = RLHFDataset(str(file), tokenizer, config.data.copy())
        return len(dataset) > 0 and all(isinstance(dataset[n]["raw_prompt"], list) for n in range(len(dataset)))
    except Exception:
        return False


@pytest.fixture
def unhashed(monkeypatch):
    """Do not hash verl's functions with their tokenizers for the cache of `datasets`, which takes half of the time."""
    for module in ("fingerprint", "arrow_dataset"):
        monkeypatch.setattr(f"datasets.{module}.update_fingerprint", lambda *_: generate_random_fingerprint())


@pytest.mark.usefixtures("unhashed")
@pytest.mark.parametrize("form", FORMS)
def test_we_take_what_verl_reads_and_refuse_the_rest_in_one_line(form, model, tokenizer, tmp_path):
    draw, taken = random.Random(form), set()
    for number in range(3):
        key = draw.choice(["prompt", "messages"])
        prompts = (GOOD * 4, draw.choices([*GOOD, *BAD], k=12), draw.choices(BAD, k=12))[number]
        more = draw.choice([{}, {"extra_info": {"index": 3}}, {"ability": "math"}])
        before = set(tmp_path.iterdir())
        try:
            FORMS[form](tmp_path / f"data-{number}", [row(prompt, key, **more) for prompt in prompts], key)
        except pa.ArrowNotImplementedError:  # pyarrow writes no such file
            continue
        (file,) = set(tmp_path.iterdir()) - before
        config = recipe(model, file, None, f"data.prompt_key={key}")
        reads = verl_reads(file, config, tokenizer)
        found = answer(config)
        assert reads == ("fault" not in found), (found, prompts)
        taken.add(reads)
        if not reads:
            assert str(file) in found["fault"]
            assert "\n" not in found["fault"]
            assert found["kind"] == "DataError"
    plain = ("list", "large_list", "fixed_size_list", "dictionary", "pandas", "jsonl", "array", "array with a mark")
    assert form not in plain or True in taken


def test_items_without_verl_are_verl_s_items(model, tokenizer, tmp_path):
    files = [tmp_path / "a.parquet", lines(tmp_path / "b.jsonl", [row(key="chat", extra_info={"index": 7})] * 3)]
    pq.write_table(pa.Table.from_pylist([row(prompt, "chat") for prompt in GOOD]), files[0])
    config = recipe(model, files, files[1], "data.prompt_key=chat")
    stock = RLHFDataset([str(file) for file in files], tokenizer, config.data)
    ours = items_of(config, "train")
    assert len(ours) == len(stock) == 6
    for place in range(6):
        told = stock[place]
        assert ours[place] == {name: told[name] for name in ours[place]}
        assert {"raw_prompt", "extra_info", "data_source", "reward_model"} <= set(ours[place])
    prompts = read_prompts(config, tokenizer, 6)
    assert {prompt.reward["extra_info"].get("index") for prompt in prompts} == {None, 7}


# ---------------------------------------------------------------- errors, by name


def test_a_column_of_another_name_or_form_is_told_with_the_columns_and_a_way(model, tmp_path):
    file = lines(tmp_path / "a.jsonl", [row(key="messages")] * 3)
    text = fault(recipe(model, file))
    assert "a.jsonl: there is no column 'prompt' (data.prompt_key); the columns are data_source, reward_model, " in text
    assert answer(recipe(model, file, None, "data.prompt_key=messages")) == {"rows": None, "warnings": []}
    text = fault(recipe(model, lines(tmp_path / "b.jsonl", [row("1 + 1?")] * 3)))
    assert "b.jsonl: no row is left (row 0: the column 'prompt' holds text where verl needs a list of mess" in text
    assert '[{"role": "user", "content": ' in text
    # A template may treat the letters of a text as messages; such data must be rejected all the same.
    loose = "actor_rollout_ref.model.custom_chat_template='{% for m in messages %}{{ m.content }}{% endfor %}.'"
    assert "row 0 cannot be rendered (the column 'prompt' holds text" in fault(
        recipe(model, tmp_path / "b.jsonl", None, loose)
    )


def test_a_model_without_a_chat_template(model, template, tmp_path):
    file, bare = lines(tmp_path / "a.jsonl", [row()] * 3), template(None)
    text = fault(recipe(bare, file), "ModelError")
    assert text.startswith(f"{bare}: its tokenizer has no chat template")
    custom = "actor_rollout_ref.model.custom_chat_template='{{ messages[0].content }}'"
    assert "fault" not in answer(recipe(bare, file, None, custom))
    own = tmp_path / "loop.yaml"
    own.write_text("[]")
    loop = f"actor_rollout_ref.rollout.agent.agent_loop_config_path={own}"
    assert "fault" not in answer(recipe(bare, file, None, loop)), "the user's own agent loop renders as it likes"
    (bare / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be loaded" in fault(recipe(bare, file), "ModelError")


REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
SYSTEM = [message("Be short.", "system"), message()]


def test_a_template_that_takes_no_system_turn(template, tmp_path):
    file = lines(tmp_path / "a.jsonl", [row(SYSTEM)] * 20)
    some = lines(tmp_path / "b.jsonl", [row(SYSTEM), *[row()] * 19])
    refuses = template(REFUSES)
    text = fault(recipe(refuses, some, file))
    assert "a.jsonl: no row is left (20 rows, 20 that cannot be rendered (row 0: TemplateError: System role" in text
    assert "put the text of the system turn into the user's turn" in text
    (warned,) = answer(recipe(refuses, some))["warnings"][:1]
    assert "b.jsonl: rows are left out (row 0: the chat template of" in warned
    text = fault(recipe(refuses, some, None, "data.filter_overlong_prompts=false"))
    assert "b.jsonl: row 0 cannot be rendered (the chat template of" in text, "verl would not leave the row out"
    told = answer(recipe(template(DROPS), file))["warnings"]
    assert told[0].startswith(f"{file}: the chat template of")
    assert told[0].endswith("drops the text of the system turn")


def test_prompts_that_are_too_long(model, tmp_path):
    long = row([message("word " * LIMIT)])
    whole, part = lines(tmp_path / "a.jsonl", [long] * 20), lines(tmp_path / "b.jsonl", [*[long] * 19, row()])
    text = fault(recipe(model, whole))
    assert "a.jsonl: no row is left (20 rows, 20 too long (row 0: " in text
    assert text.endswith("raise data.max_prompt_length, or shorten the prompts")
    assert "b.jsonl: the first 8 rows are left out (row 0: " in answer(recipe(model, part))["warnings"][0]
    told = answer(recipe(model, [whole, part], part))["warnings"]
    assert any("a.jsonl: no row is left" in text for text in told), "of two files one is enough"
    assert "fault" in answer(recipe(model, part, None, "data.train_max_samples=9", "data.shuffle=false"))
    unfiltered = "data.filter_overlong_prompts=false"
    assert "leave such rows out, or data.truncation=left" in fault(recipe(model, whole, None, unfiltered))
    cut = answer(recipe(model, whole, None, unfiltered, "data.truncation=left"))["warnings"][0]
    assert "the beginning of long prompts is cut" in cut


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"reward_model": None}, "row 2: the column 'reward_model' is missing"),
     ({"reward_model": {"style": "rule"}}, "row 2: the column 'reward_model' has no ground_truth"),
     ({"reward_model": "2"}, "row 2: the column 'reward_model' has no ground_truth")],
)  # fmt: skip
def test_a_row_without_what_a_reward_is_told(model, tmp_path, changes, words):
    table = pa.Table.from_pylist([row()] * 2 + [row() | changes] * 7) if changes["reward_model"] is None else None
    file = tmp_path / "a.parquet"
    pq.write_table(table if table is not None else pa.Table.from_pylist([row() | changes] * 9), file)
    said = fault(recipe(model, file))
    assert words.replace("row 2", "row 2" if table is not None else "row 0") in said
    managed = ["reward.reward_manager.source=importlib", "reward.reward_manager.module.path=mine.py"]
    assert "fault" not in answer(recipe(model, file, None, *managed)), "a manager of the user's own may not need it"


@pytest.mark.parametrize(
    ("source", "words"),
    [("mine", "raises NotImplementedError (Reward function is not implemented for data_source='mine')"),
     ("numina_olympiads", "raises ModuleNotFoundError"), ("openai/gsm8k", ""), ("math_dapo", "")],
)  # fmt: skip
def test_verl_s_own_reward_is_asked_where_a_recipe_names_none(model, tmp_path, source, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "verl.utils.reward_score.prime_math", None)  # as if sympy were missing
    good = lines(tmp_path / "a.jsonl", [row(data_source="openai/gsm8k")] * 3)
    file = lines(tmp_path / "b.jsonl", [row(data_source=source)] * 3)
    config = recipe(model, [good, file], good, "reward.custom_reward_function.path=null")
    if not words:
        assert "fault" not in answer(config)
        return
    said = fault(config, "ConfigError")
    assert said.startswith(f"{file}: row 0: verl's own reward function {words}")
    assert said.endswith("set reward.custom_reward_function.path to one of yours (docs/rewards.md)")
    assert "fault" not in answer(recipe(model, file, good)), "another function judges"


def test_verl_s_own_reward_runs_no_code_before_a_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr("verl.utils.reward_score.default_compute_score", lambda *_, **__: pytest.fail("called"))
    file = lines(tmp_path / "a.jsonl", [row(data_source="codecontests")] * 3)
    assert "fault" not in answer(recipe(model, file, None, "reward.custom_reward_function.path=null"))


def test_an_answer_about_another_reward_is_not_used_again(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "_ask", answer)
    file = lines(tmp_path / "a.jsonl", [row()] * 3)
    assert check_data(recipe(model, file)).rows == {"train": 3, "test": 3}
    with pytest.raises(ConfigError, match="verl's own reward function"):
        check_data(recipe(model, file, None, "reward.custom_reward_function.path=null"))


def test_files_that_verl_cannot_join_or_fills_up(model, tmp_path):
    text, number, bare = tmp_path / "text.parquet", tmp_path / "number.parquet", tmp_path / "bare.parquet"
    pq.write_table(pa.Table.from_pylist([row()] * 3), text)
    pq.write_table(pa.Table.from_pylist([row(reward_model={"style": "rule", "ground_truth": 2})] * 3), number)
    pq.write_table(pa.Table.from_pylist([row()] * 3).drop_columns("data_source"), bare)
    said = fault(recipe(model, [text, number]))
    assert "data.train_files: verl cannot join its files: the column 'reward_model' is" in said
    assert str(number) in said
    arrow(tmp_path / "large", [row()] * 3, "prompt", pa.large_list)
    said = fault(recipe(model, [text, tmp_path / "large.parquet"]))
    assert "the column 'prompt' is LargeList(" in said, "neither does verl join those"
    assert "row 0 has no data_source" in fault(recipe(model, bare))
    assert "fault" not in answer(recipe(model, [text, bare])), "verl fills the column up"


# ---------------------------------------------------------------- a data class of the user

OWN = """
import csv
from torch.utils.data import Dataset

class Csv(Dataset):
    def __init__(self, data_files, tokenizer, config, processor=None, max_samples=-1):
        rows = [row for file in data_files for row in csv.DictReader(open(file))]
        self.rows = rows[:max_samples] if max_samples > 0 else rows
    def __len__(self):
        return len(self.rows)
    def __getitem__(self, place):
        row = self.rows[place]
        prompt = [{"role": "user", "content": row["question"]}]
        return {"raw_prompt": prompt, "data_source": "csv", "reward_model": {"ground_truth": row["answer"]},
                "extra_info": {}, "dummy_tensor": None}

class Broken(Csv):
    def __getitem__(self, place):
        return {"raw_prompt": self.rows[place]["missing"]}
"""


def test_a_class_of_the_user_s_own_decides(model, tokenizer, tmp_path, monkeypatch):
    module, file, reward = tmp_path / "own.py", tmp_path / "a.csv", tmp_path / "reward.py"
    module.write_text(OWN)
    reward.write_text(REWARD)
    file.write_text("question,answer\n" + "".join(f"{n} + 1?,{n + 1}\n" for n in range(30)))
    own = [f"data.custom_cls.path={module}", "data.custom_cls.name=Csv", "data.val_max_samples=7"]
    config = recipe(model, file, None, *own, f"reward.custom_reward_function.path={reward}")
    assert answer(config) == {"rows": {"train": 30, "test": 7}, "warnings": []}
    monkeypatch.setattr(rows, "_ask", answer)  # starting a process takes seconds
    assert prepare_data(config).rows == {"train": 30, "test": 7}
    assert [len(prompt.ids) > 0 for prompt in read_prompts(config, tokenizer, 3)] == [True] * 3
    judged = recipe(model, file, None, *own)
    assert check_data(judged).rows == {"train": 30, "test": 7}
    file.write_text(file.read_text().replace("7 + 1?,8", "7 + 1?,eight"))
    with pytest.raises(DataError, match=r"data\.train_files: row 7 .*'eight'"):
        check_data(judged)
    own[1] = "data.custom_cls.name=Broken"
    assert "row 0: the class Broken of data.custom_cls raises KeyError ('missing')" in fault(
        recipe(model, file, None, *own)
    )
    own[1] = "data.custom_cls.name=None"
    assert "data.custom_cls: None of" in fault(recipe(model, file, None, *own), "ConfigError")


# ---------------------------------------------------------------- how verl is called


def test_verl_is_asked_in_its_own_process_once(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "reward.py").write_text(REWARD)
    reward = f"reward.custom_reward_function.path={tmp_path / 'reward.py'}"
    file = lines(tmp_path / "a.jsonl", [row(key="chat")] * 5)
    config = recipe(model, file, file, reward, "data.prompt_key=chat")
    config.data.train_files = str([str(file), str(file)])  # as verl's example scripts write a list
    assert prepare_data(config).rows == {"train": 10, "test": 5}
    assert list(config.data.train_files) == [str(file)] * 2

    def never(config):
        raise AssertionError("asked again")

    monkeypatch.setattr(rows, "_answers", {})
    monkeypatch.setattr(rows, "_ask", never)
    assert prepare_data(config).rows == {"train": 10, "test": 5}
    for change in ("data.max_prompt_length=63", "data.prompt_key=prompt"):
        with pytest.raises(AssertionError, match="asked again"):
            prepare_data(recipe(model, file, None, reward, "data.prompt_key=chat", change))
    lines(file, [row(key="chat")] * 6)
    with pytest.raises(AssertionError, match="asked again"):
        prepare_data(config)


@pytest.mark.parametrize("of", ["model", "tokenizer_path"])
def test_verl_is_asked_again_if_the_tokenizer_has_changed(of, model, template, tmp_path, monkeypatch):
    """The changed file has the size and the time of the old one, as after `cp -p`."""
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    questions = []
    monkeypatch.setattr(rows, "_ask", lambda config: questions.append(1) or {"rows": None, "warnings": []})
    folder, file = template("{{ messages[0].content }}!"), lines(tmp_path / "a.jsonl", [row()] * 5)
    path = f"actor_rollout_ref.model.tokenizer_path={folder}"
    config = recipe(folder, file) if of == "model" else recipe(model, file, None, path)

    def asked() -> int:
        monkeypatch.setattr(rows, "_answers", {})  # as in another process
        check_data(config)
        return len(questions)

    assert [asked(), asked()] == [1, 1]
    changed = folder / "chat_template.jinja"
    before = changed.stat()
    changed.write_text("{{ messages[0].content }}?")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert changed.stat().st_size == before.st_size
    assert asked() == 2
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("")
    assert asked() == 3


def test_verl_is_asked_every_time_about_a_tokenizer_on_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    questions = []
    monkeypatch.setattr(rows, "_ask", lambda config: questions.append(1) or {"rows": None, "warnings": []})
    file = lines(tmp_path / "a.jsonl", [row()] * 5)
    config = recipe(model, file, None, "actor_rollout_ref.model.tokenizer_path=someone/tokenizer")
    for _ in range(2):
        check_data(config)
    assert len(questions) == 2


def test_verl_is_not_asked_again_about_data_that_each_run_makes_anew(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    questions = []
    monkeypatch.setattr(rows, "_ask", lambda config: questions.append(1) or {"rows": None, "warnings": []})
    for _ in range(2):
        monkeypatch.setattr(rows, "_answers", {})  # as in another process
        prepare_data(load_recipe("e12", ["profile=cpu", f"actor_rollout_ref.model.path={model}"]))
    assert len(questions) == 1


def test_the_doctor_tells_what_is_wrong_with_the_data(model, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "_ask", answer)
    assert checks.check_rows(load_recipe("e6a", ["profile=cuda"])).found == "not checked: gsm8k is not on disk yet"
    good = lines(tmp_path / "a.jsonl", [row()] * 5)
    assert checks.check_rows(recipe(model, good)).found == "5 rows for training, 5 for validation"
    for changes, words in (({"prompt": "text"}, "no row is left"), (
        {"reward_model": {"ground_truth": "one half"}}, "row 0 (counted from 0) has the ground truth 'one half'"
    )):  # fmt: skip
        finding = checks.check_rows(recipe(model, good, lines(tmp_path / "b.jsonl", [row() | changes] * 5)))
        assert (finding.what, finding.found) == ("data", "cannot be used")
        assert words in finding.fix


def test_errors_keep_their_class_and_verl_s_own_death_is_told(model, template, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    file = lines(tmp_path / "a.jsonl", [row()] * 5)
    monkeypatch.setattr(rows, "_ask", answer)
    with pytest.raises(ModelError, match="no chat template"):
        check_data(recipe(template(None), file))
    with pytest.raises(ConfigError, match=r"data\.custom_cls"):
        check_data(recipe(model, file, None, "data.custom_cls.path=none.py", "data.custom_cls.name=None"))
    assert OmegaConf.select(recipe(model, file), "data.custom_cls.path") is None


def test_the_examples_of_the_user_s_page(model, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/your_data.md").read_text()
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, {})
    config = recipe(model, tmp_path / "sums.jsonl", tmp_path / "sums.parquet")
    assert answer(config) == {"rows": None, "warnings": []}
    monkeypatch.setattr(rows, "_ask", answer)
    assert check_data(config).rows == {"train": 2, "test": 2}
