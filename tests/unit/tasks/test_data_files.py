"""Data files of a user: how they are read, counted and rejected, and the rows that prompts are made of."""

import json

import pytest

from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError, DataError
from verl_aqn.preflight.policy import load_tokenizer, prompt_tokens
from verl_aqn.preflight.probe.probe_inputs import read_prompts
from verl_aqn.preflight.recipe_checks import check_rows
from verl_aqn.preflight.run_data import data_files, items_of, steps_in_data
from verl_aqn.tasks.data_files import check_truths, count_rows, read_file, sources_of
from verl_aqn.tasks.smollm2 import tiny_model


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(truth="2", **more):
    return {"data_source": "mine", "chat": [{"role": "user", "content": "1 + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": truth}, **more}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.jsonl", b'{"a": 1}\n\n{"a": }\n', "line 3, column 7: Expecting value"),
     ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: it is not UTF-8"),
     ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "line 1: it is not UTF-8"),
     ("a.json", b'[{"a": 1},\n{"a": 2]', "line 2, column 8: Expecting ',' delimiter"),
     ("a.json", b'\xef\xbb\xbf{"a": 1}\n{"a": 1\n', "line 3, column 1: Expecting ',' delimiter"),
     ("a.json", b"[]", "no rows"), ("a.jsonl", b"", "no rows"), ("a.parquet", b"", "no rows"),
     ("a.parquet", b"PAR1 and so on", "not a readable parquet file"),
     ("a.txt", b"a", r"verl reads files that end in \.parquet, \.json, \.jsonl")],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_told_by_its_first_bad_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    for read in (count_rows, read_file):
        with pytest.raises(DataError, match=words) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_names_of_files(tmp_path):
    config = load_recipe("e6a", ["profile=cpu"])
    for name, words in ((tmp_path / ("x" * 300), "no such file"), (tmp_path, "a folder"),
                        ("hdfs://a/b", "local disk"), ("s3://a/b.parquet", "local disk"),
                        ("https://a/b.jsonl", "local disk")):  # fmt: skip
        config.data.train_files = str(name)
        with pytest.raises(DataError, match=words):
            count_rows(*data_files(config, "train_files"))
    config.data.train_files = "['a.parquet', b.jsonl]"
    assert [file.name for file in data_files(config, "train_files")] == ["a.parquet", "b.jsonl"]
    (odd := tmp_path / "[a].jsonl").write_text("{}")
    config.data.train_files = str(odd)
    assert data_files(config, "train_files") == [odd]
    for text in ("[", "[1]", "[[a]]", "[]"):
        config.data.train_files = text
        with pytest.raises(ConfigError, match=r"^data\.train_files=.*: give a file"):
            data_files(config, "train_files")
        assert "give a file" in check_rows(config).fix


def test_truths_of_several_types_in_one_file_are_judged_one_by_one(tmp_path):
    rows = [row("2"), row(3), row("1,234.5")]
    check_truths(lines(tmp_path / "a.jsonl", rows))
    assert sources_of(tmp_path / "a.jsonl") == {"mine"}
    for bad, shown in (("two", "'two'"), ("", "''"), (None, "null"), ([7], r"\[7\]")):
        with pytest.raises(DataError, match=rf"row 3 .* ground truth {shown}"):
            check_truths(lines(tmp_path / "b.jsonl", [*rows, row(bad)]))
    with pytest.raises(DataError, match="row 0: the column 'reward_model' is missing"):
        check_truths(lines(tmp_path / "c.jsonl", [{"chat": []}]))


def test_prompts_by_another_key_without_extra_info_and_without_rows_that_verl_leaves_out(tmp_path):
    model = tiny_model(tmp_path / "tiny")
    file = lines(tmp_path / "a.jsonl", [row(), row(chat=None), row(), row(chat=[]), row()])
    files = [f"data.{key}={file}" for key in ("train_files", "val_files")]
    config = load_recipe("e6a", [
        "profile=cpu", f"actor_rollout_ref.model.path={model}", "data.prompt_key=chat", "data.train_batch_size=1",
        "actor_rollout_ref.actor.ppo_mini_batch_size=1", "trainer.total_training_steps=null", *files,
    ])  # fmt: skip
    assert steps_in_data(config) == 5 * config.trainer.total_epochs
    tokenizer = load_tokenizer(config, model)
    prompts = read_prompts(config, tokenizer, 3)
    assert {prompt.row for prompt in prompts} == {0, 2, 4}
    assert prompts[0].reward == {"data_source": "mine", "ground_truth": "2", "extra_info": {}}
    with pytest.raises(DataError, match="has 3 prompts within"):
        read_prompts(config, tokenizer, 4)
    config.actor_rollout_ref.model.custom_chat_template = "{{ messages[0].content }}"
    assert (
        load_tokenizer(config, model).decode(prompt_tokens(config, load_tokenizer(config, model), row()["chat"]))
        == "1 + 1?"
    )
    config.data.max_prompt_length = 2
    assert prompt_tokens(config, tokenizer, row()["chat"]) is None
    config.data.filter_overlong_prompts = False
    assert prompt_tokens(config, tokenizer, row()["chat"]) == prompts[0].ids[-2:], "verl cuts the beginning"
    config.data.prompt_key = "prompt"
    with pytest.raises(
        DataError, match=r"there is no column 'prompt' .*the columns are data_source, chat, reward_model"
    ):
        items_of(config, "train")
