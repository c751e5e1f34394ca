"""Whether an answer is right: one judgement, asked before a run, in it and of its records."""

import json

import numpy as np
import pytest
import torch

from verl_aqn.config import load_recipe
from verl_aqn.errors import ConfigError
from verl_aqn.run_data import prepare_data
from verl_aqn.runs.accuracy import acc_in, is_right, judged, recorded, reward_in
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.verdict import compare_validations

RIGHT = [1, True, 1.0, np.float32(1), np.bool_(True), np.int64(1), torch.tensor(1.0), np.array(1)]
WRONG = [0, False, 0.0, -0.0, np.float64(0), np.bool_(False), torch.tensor(False)]
NEITHER = [
    None,
    float("nan"),
    0.5,
    -1,
    -1.0,
    2,
    "1",
    "true",
    b"1",
    [1],
    {"acc": 1},
    np.ones(1),
    np.ones(2),
    1 + 0j,
    1e-9,
]


def test_an_accuracy_is_0_or_1_and_nothing_is_made_one():
    assert [is_right(one) for one in RIGHT] == [True] * len(RIGHT)
    assert [is_right(one) for one in WRONG] == [False] * len(WRONG)
    assert [is_right(one) for one in NEITHER] == [None] * len(NEITHER)
    assert judged([*RIGHT, *WRONG]) == [True] * len(RIGHT) + [False] * len(WRONG)
    assert (recorded({"acc": 1.0}), recorded({"acc": 0}), recorded({"acc": None}), recorded({})) == (
        True, False, None, None,
    )  # fmt: skip


@pytest.mark.parametrize("value", NEITHER, ids=repr)
def test_anything_else_is_refused_with_what_to_return(value):
    for result in (() if isinstance(value, dict) else (value,), {"score": 1.0, "acc": value}, {"score": 1.0}):
        with pytest.raises(ConfigError, match=r"let it return \{'score': REWARD, 'acc': 1 if") as caught:
            acc_in(result)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"acc=.* for 2 of 3 answers"):
        judged([1, value, value])


def test_the_reward_of_training_is_the_score():
    assert (reward_in({"score": -1.0, "acc": 1}), reward_in(0.25)) == (-1.0, 0.25)
    assert (acc_in({"score": -1.0, "acc": 1}), acc_in(0.0), acc_in(True)) == (True, False, True)
    for result in ({"acc": 1}, {"score": None, "acc": 1}, None, "much"):
        with pytest.raises(ConfigError, match="no number as reward"):
            reward_in(result)


REWARD = """
import sys
def compute_score({arguments}):
    {body}
async def later(**told):
    return -1.0
"""


def ask(tmp_path, body, arguments="data_source, solution_str, ground_truth, extra_info", more=()):
    """Prepare a run of the embedded task with a reward of the user's own."""
    file = tmp_path / "reward.py"
    file.write_text(REWARD.format(body=body, arguments=arguments))
    overrides = ["profile=cpu", f"reward.custom_reward_function.path={file}", *more]
    return prepare_data(load_recipe("e6a", overrides)).rows


@pytest.mark.parametrize(
    "body",
    ["return {'score': 0.3, 'acc': ground_truth in solution_str}", "return float(ground_truth in solution_str)",
     "return {'score': -1, 'acc': 0, 'flexible': 1}", "extra_info['num_turns']; return 0",
     "extra_info['index'] = 'mine'; return 1"],
)  # fmt: skip
def test_a_reward_that_tells_right_from_wrong_is_taken(tmp_path, body):
    assert ask(tmp_path, body) == {"train": 2048, "test": 192}


@pytest.mark.parametrize(
    ("body", "said"),
    [("return 1.0 if ground_truth in solution_str else -1.0", r"returned -1\.0"),
     ("return 0.5 * (ground_truth in solution_str)", r"returned 0\.5"),  # shows only where the answer is right
     ("return {'score': 1.0}", "without 'acc'"), ("return {'score': 1.0, 'acc': None}", "acc=None"),
     ("return {'score': 1.0, 'acc': 0.5}", r"acc=0\.5"),
     ("return {'score': 1.0, 'acc': 1, 'flexible': 0.5}", "flexible"),
     ("return {'acc': 1}", "no number as reward"), ("return None", "returned None"),
     ("return float(solution_str)", "raises ValueError .*row 0 of .*parquet"),
     ("sys.nothing", "raises AttributeError")],
)  # fmt: skip
def test_a_reward_that_does_not_is_refused_before_anything_starts(tmp_path, body, said):
    with pytest.raises(ConfigError, match=said) as caught:
        ask(tmp_path, body)
    assert "let it return" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_is_asked_with_its_own_settings_and_not_where_it_cannot_answer(tmp_path):
    key = "reward.custom_reward_function"
    more = [f"+{key}.reward_kwargs.bonus=1"]
    assert ask(tmp_path, "return bonus", "bonus, **told", more)
    with pytest.raises(ConfigError, match="returned 2"):
        ask(tmp_path, "return bonus", "bonus, **told", [f"+{key}.reward_kwargs.bonus=2"])
    assert ask(tmp_path, "return -1", more=[f"{key}.name=later"])
    assert ask(tmp_path, "return -1", more=["reward.reward_model.enable=true"])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ask(tmp_path, "return 1", more=[f"{key}.name=nothing"])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ask(tmp_path, "return )")


def test_before_and_after_are_compared_only_where_every_judgement_is_on_record(tmp_path):
    (tmp_path / "validation").mkdir()
    for step, accs in ((0, [0, 0.0, False]), (2, [1, 1.0, True])):
        lines = [{"input": f"{n}?", "gts": "1", "output": "", "acc": acc} for n, acc in enumerate(accs)]
        (tmp_path / f"validation/{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_validations(RunFolder(tmp_path), 0, 2)
    assert (found.n, found.before, found.after) == (3, 0.0, 1.0)
    for acc in (None, 0.5, -1):
        lines[1]["acc"] = acc
        (tmp_path / "validation/2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert compare_validations(RunFolder(tmp_path), 0, 2) is None
