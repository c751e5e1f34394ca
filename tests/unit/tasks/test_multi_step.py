"""The harder generated task: right answers step by step, and splits that share neither an expression nor a clause."""

import itertools
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest

from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError
from verl_aqn.preflight.policy import load_tokenizer, prompt_tokens
from verl_aqn.preflight.run_data import steps_in_data
from verl_aqn.tasks.gsm8k import score
from verl_aqn.tasks.multi_step import STEPS, prepare_multi_step, problems, prompt
from verl_aqn.tasks.smollm2 import tiny_model
from verl_aqn.tasks.word_problems import NAMES, THINGS


def expression(question: str) -> str:
    return re.search(r"[.] ([-+*0-9 ]+)[?]$", question.replace(", then", ""))[1]


def clauses(question: str) -> set[str]:
    """Return the clauses of a question's text without names, things and numbers."""
    text = question.rpartition(". ")[0]
    text = re.sub(rf"\b({'|'.join(NAMES)})\b", "NAME", text)
    text = re.sub(rf"\b({'|'.join(THINGS)})\b", "THINGS", text)
    return set(re.split(r", | and ", re.sub(r"[0-9]+", "N", text)))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("steps", STEPS)
def test_every_line_of_an_answer_is_right_and_goes_on_from_the_one_before(steps, split):
    for problem in problems(300, split, seed=3, steps=steps):
        asked = expression(problem.question)
        assert int(problem.truth) == eval(asked), problem
        *lines, end = problem.answer.splitlines()
        assert (len(lines), end) == (steps, f"#### {problem.truth}")
        said = [re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", line).groups() for line in lines]
        assert [int(result) for *_, result in said] == [
            {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] for a, sign, b, _ in said
        ]
        assert all(after[0] == before[-1] for before, after in itertools.pairwise(said))
        assert asked == " ".join([said[0][0], *(part for _, sign, number, _ in said for part in (sign, number))])
        assert re.findall(r"[0-9]+", problem.question.rpartition(". ")[0]) == re.findall(r"[0-9]+", asked)
        assert score(problem.answer, problem.truth) == 1.0
        assert score(problem.answer.replace("#### ", "#### 1"), problem.truth) == 0.0


@pytest.mark.parametrize("steps", STEPS)
def test_a_test_problem_has_an_expression_and_clauses_that_no_training_problem_has(steps):
    train = [p.question for seed in (0, 1) for p in problems(2000, "train", seed, steps)]
    test = [p.question for seed in (0, 7) for p in problems(300, "test", seed, steps)]
    assert not set(map(expression, train)) & set(map(expression, test))
    assert not set().union(*map(clauses, train)) & set().union(*map(clauses, test))


@pytest.mark.parametrize("steps", STEPS)
def test_questions_differ_follow_the_seed_and_have_all_signs(steps):
    first = problems(600, "train", 0, steps)
    assert len({p.question for p in first}) == 600
    assert first == problems(600, "train", 0, steps)
    assert first[:60] == problems(60, "train", 0, steps)
    assert first != problems(600, "train", 1, steps)
    signs = Counter(p.operation for p in first)
    assert len(signs) == 3 * 2 ** (steps - 1)
    assert set(signs.values()) == {600 // len(signs)}


def test_files(tmp_path):
    paths = prepare_multi_step(tmp_path, 12, 6, steps=3)
    rows = pq.read_table(paths["test"]).to_pylist()
    chosen = problems(6, "test", 0, 3)
    assert [row["reward_model"]["ground_truth"] for row in rows] == [p.truth for p in chosen]
    assert [row["prompt"] for row in rows] == [prompt(p.question, 3) for p in chosen]
    for message in rows[0]["prompt"]:
        if message["role"] == "assistant":  # the worked examples are right, too
            assert message["content"].count("=") == 3
    assert len({str(row["prompt"][:-1]) for row in rows}) == 1


def test_worked_examples_are_no_test_problems():
    for steps in STEPS:
        shown = {expression(m["content"]) for m in prompt("", steps)[:-1] if m["role"] != "assistant"}
        assert len(shown) == 4
        test = {expression(p.question) for p in problems(600, "test", 0, steps)}
        assert not shown & test


@pytest.mark.parametrize("steps", STEPS)
def test_the_experiment_has_these_problems_and_room_for_them(steps, tmp_path):
    """An answer that fills the room would be penalised for its length."""
    config = load_recipe("e12_aggressive_1ep", ["profile=cpu", f"experiment=embedded_{steps}"])
    assert (config.data.train_files, config.data.val_files) == (f"embedded_{steps}",) * 2
    assert steps_in_data(config) == 29
    one_step = load_recipe("e12_aggressive_1ep", ["profile=cpu", "experiment=embedded"])
    differ = {key for key in config.data if config.data[key] != one_step.data[key]}
    assert differ == {"train_files", "val_files", "max_prompt_length", "max_response_length"}
    config.actor_rollout_ref.model.path = str(tiny_model(tmp_path / "tiny"))  # it has the embedded model's tokenizer
    tokenizer = load_tokenizer(config, tmp_path / "tiny")
    free = config.data.max_response_length - config.reward.reward_kwargs.overlong_buffer_cfg.len
    for problem in (*problems(96, "train", 0, steps), *problems(96, "test", 0, steps)):
        assert prompt_tokens(config, tokenizer, prompt(problem.question, steps)) is not None
        assert len(tokenizer(problem.answer).input_ids) < free


@pytest.mark.parametrize(
    ("n", "split", "steps"), [(0, "train", 2), (10_001, "train", 2), (1, "valid", 2), (1, "train", 1)]
)
def test_what_does_not_exist_is_refused(n, split, steps):
    with pytest.raises(ConfigError, match="word problems: "):
        problems(n, split, 0, steps)
