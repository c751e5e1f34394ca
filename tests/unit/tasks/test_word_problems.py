"""The generated task: right answers, disjoint splits, the same bytes for the same seed, a form that verl reads."""

import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from verl_aqn.errors import ConfigError
from verl_aqn.tasks.data_files import count_rows
from verl_aqn.tasks.gsm8k import score
from verl_aqn.tasks.word_problems import OPERATIONS, SOURCE, prepare_word_problems, problems, prompt

_ANSWER = re.compile(r"([2-9]) ([-+*]) ([2-9]) = ([0-9]+)\n#### ([0-9]+)")


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split):
    for problem in problems(300, split, seed=3):
        a, sign, b, result, marked = _ANSWER.fullmatch(problem.answer).groups()
        a, b = int(a), int(b)
        assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign] > 0
        assert result == marked == problem.truth
        assert problem.question.endswith(f" {a} {sign} {b}?")
        assert re.findall(r"[0-9]+", problem.question.rpartition(".")[0]) in ([str(a), str(b)], [str(b), str(a)])
        assert score(problem.answer, problem.truth) == 1.0


def test_splits_are_disjoint_and_operations_even():
    train = {p.question for seed in (0, 1) for p in problems(900, "train", seed)}
    test = [p for seed in (0, 7) for p in problems(300, "test", seed)]
    assert not train & {p.question for p in test}
    assert Counter(p.operation for p in problems(300, "test", 0)) == dict.fromkeys(OPERATIONS, 100)


def test_questions_differ_and_follow_the_seed():
    first = problems(600, "train", seed=0)
    assert len({p.question for p in first}) == 600
    assert first == problems(600, "train", seed=0)
    assert first[:60] == problems(60, "train", seed=0)  # a shorter set is the start of a longer one
    assert first != problems(600, "train", seed=1)


def test_files(tmp_path):
    paths = prepare_word_problems(tmp_path, 12, 6, seed=0)
    assert {split: count_rows(path) for split, path in paths.items()} == {"train": 12, "test": 6}
    before = paths["train"].read_bytes()
    rows = pq.read_table(paths["train"]).to_pylist()
    assert rows[5]["extra_info"]["index"] == 5
    assert rows[5]["data_source"] == SOURCE
    assert rows[5]["prompt"] == prompt(rows[5]["extra_info"]["question"])
    assert rows[5]["reward_model"] == {"style": "rule", "ground_truth": problems(6, "train", 0)[5].truth}
    assert len({str(r["prompt"][:-1]) for r in rows}) == 1  # the shared first part
    state = paths["train"].stat()
    assert prepare_word_problems(tmp_path, 12, 6, seed=0)["train"].read_bytes() == before
    assert paths["train"].stat().st_mtime_ns == state.st_mtime_ns, "an equal file is left as it is"
    prepare_word_problems(tmp_path, 12, 6, seed=1)
    assert paths["train"].read_bytes() != before
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(before)
    paths["train"].unlink()
    paths["train"].symlink_to(elsewhere)
    assert not prepare_word_problems(tmp_path, 12, 6, seed=0)["train"].is_symlink()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["elsewhere", "test.parquet", "train.parquet"]


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="'train' or 'test'"):
        problems(3, "validation", 0)
    with pytest.raises(ConfigError, match="n=0"):
        prepare_word_problems(tmp_path, 0, 6)
