"""Whether a response is right: one definition, checked before a run and used in the run and its records."""

import json

import numpy as np
import pytest
import torch

from tests.helpers.composed import recipe_with
from verl_aqn.errors import ConfigError
from verl_aqn.preflight.reward_function import settle_reward
from verl_aqn.preflight.run_data import prepare_data
from verl_aqn.runs.accuracy import acc_in, is_right, judged, recorded, reward_in
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats.verdict import compare_validations
from verl_aqn.tasks.parquet import row, write_parquet

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
        with pytest.raises(ConfigError, match=r"return \{'score': REWARD, 'acc': 1 if") as caught:
            acc_in(result)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"acc=.* for 2 of 3 responses"):
        judged([1, value, value])


def test_the_reward_of_training_is_the_score():
    assert (reward_in({"score": -1.0, "acc": 1}), reward_in(0.25)) == (-1.0, 0.25)
    assert (acc_in({"score": -1.0, "acc": 1}), acc_in(0.0), acc_in(True)) == (True, False, True)
    for one in (np.float32(0.5), torch.tensor(0.5), np.array(0.5), True, 2):
        assert reward_in({"score": one, "acc": 1}) == float(one)
    for one in (None, "much", "1.0", float("nan"), float("inf"), np.float32("nan"), [1.0], np.ones(1), 1 + 0j):
        for result in (one, {"score": one, "acc": 1}):
            with pytest.raises(ConfigError, match="has no finite number as the reward"):
                reward_in(result)
    with pytest.raises(ConfigError, match="has no finite number as the reward"):
        reward_in({"acc": 1})


REWARD = """
import sys
def compute_score({arguments}):
    {body}
async def later(ground_truth, **told):
    return float(ground_truth in told["solution_str"])
async def never(**told):
    import asyncio
    await asyncio.sleep(60)
def promises(**told):
    return later(**told)
def takes_too_little(solution_str, ground_truth):
    return 1.0
def wants_more(data_source, solution_str, ground_truth, extra_info, tokenizer):
    return 1.0
number = 7
"""


def ask(tmp_path, body, arguments="data_source, solution_str, ground_truth, extra_info", more=()):
    """Prepare a run of the embedded task with a reward of the user."""
    file = tmp_path / "reward.py"
    file.write_text(REWARD.format(body=body, arguments=arguments))
    return prepare_data(recipe_with("e6a", f"reward.custom_reward_function.path={file}", *more)).rows


@pytest.mark.parametrize(
    "body",
    ["return {'score': 0.3, 'acc': ground_truth in solution_str}", "return float(ground_truth in solution_str)",
     "return {'score': -1, 'acc': 0, 'flexible': 1}",
     "extra_info['index'] = 'mine'; return 1"],
)  # fmt: skip
def test_a_reward_that_tells_right_from_wrong_is_taken(tmp_path, body):
    assert ask(tmp_path, body) == {"train": 2048, "test": 192}


@pytest.mark.parametrize(
    ("body", "said"),
    [("return 1.0 if ground_truth in solution_str else -1.0", r"returned -1\.0"),
     ("return 0.5 * (ground_truth in solution_str)", r"returned 0\.5"),  # visible only if the answer is right
     ("return {'score': 1.0}", "without 'acc'"), ("return {'score': 1.0, 'acc': None}", "acc=None"),
     ("return {'score': 1.0, 'acc': 0.5}", r"acc=0\.5"),
     ("return {'score': 1.0, 'acc': 1, 'flexible': 0.5}", "flexible"),
     ("return {'acc': 1}", "has no finite number as the reward"),
     ("return {'score': float('nan'), 'acc': 1}", "no finite number"), ("return {'score': '1', 'acc': 1}", "no finite"),
     ("extra_info['num_turns']; return 0", "KeyError: 'num_turns'"),  # verl's dapo does not return it
     ("return None", "returned None"),
     ("return float(solution_str)", r"reward\.py:4: ValueError: .*row 0 of .*parquet"),
     ("sys.nothing", "AttributeError: ")],
)  # fmt: skip
def test_a_reward_that_does_not_is_refused_before_anything_starts(tmp_path, body, said):
    with pytest.raises(ConfigError, match=said) as caught:
        ask(tmp_path, body)
    assert ": return " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_is_asked_about_the_first_row_of_every_file(tmp_path):
    """One function judges files of several sources, and may not know one of them."""
    body = "assert data_source != 'new', 'what is new?'; return float(ground_truth in solution_str)"
    files = [
        write_parquet(
            [row(source, [{"role": "user", "content": "1 + 1?"}], "2", split="train", index=0, question="", answer="")]
            * 300,
            tmp_path / f"{source}.parquet",
        )
        for source in ("known", "new")
    ]
    with pytest.raises(ConfigError, match=r"what is new\?.*row 0 of .*new\.parquet"):
        ask(tmp_path, body, more=[f"data.train_files=[{files[0]},{files[1]}]"])


KEY = "reward.custom_reward_function"


def test_a_reward_is_asked_with_its_own_settings(tmp_path, monkeypatch):
    more = [f"+{KEY}.reward_kwargs.bonus=1"]
    assert ask(tmp_path, "return bonus", "bonus, **told", more)
    with pytest.raises(ConfigError, match="returned 2"):
        ask(tmp_path, "return bonus", "bonus, **told", [f"+{KEY}.reward_kwargs.bonus=2"])
    # In verl these override the reward's own values.
    with pytest.raises(ConfigError, match="returned 3"):
        ask(tmp_path, "return data_source", more=[f"+{KEY}.reward_kwargs.data_source=3"])
    for manager in ("naive", "remote"):
        manager = f"reward.reward_manager.name={manager}"
        assert ask(tmp_path, "extra_info['num_turns'] + 0; return 0", more=[manager])
    assert ask(tmp_path, "return 1", more=[f"{KEY}.name=later"])
    with pytest.raises(ConfigError, match=r"returned coroutine: define it with `async def`"):
        ask(tmp_path, "return 1", more=[f"{KEY}.name=promises"])
    monkeypatch.setattr("verl_aqn.preflight.reward_function.ASYNC_TIMEOUT_S", 0.1)
    assert ask(tmp_path, "return 1", more=[f"{KEY}.name=never"])
    own = ["reward.reward_manager.source=importlib", "reward.reward_manager.module.path=own.py"]
    assert ask(tmp_path, "return -1", more=own), "who calls the function is not verl's manager"


def test_what_filters_groups_has_to_be_told(tmp_path):
    groups = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=score"]
    assert ask(tmp_path, "return {'score': 1, 'acc': 1}", more=groups)
    with pytest.raises(ConfigError, match="returned no 'score', which is algorithm"):
        ask(tmp_path, "return 1.0", more=groups)


def settled(tmp_path, *overrides, body="return 1"):
    file = tmp_path / "reward.py"
    file.write_text(REWARD.format(body=body, arguments="data_source, solution_str, ground_truth, extra_info"))
    config = recipe_with("e6a", f"{KEY}.path={file}", *overrides)
    settle_reward(config)
    return config.reward.custom_reward_function.path


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([f"{KEY}.path=/nowhere/reward.py"], r"path=/nowhere/reward\.py: no such file"),
        ([f"{KEY}.path=pkg://no.such.module"], r"cannot be loaded: ModuleNotFoundError: No module named 'no'"),
        ([f"{KEY}.name=compute_scores"], "name=compute_scores does not exist in it: did you mean 'compute_score'"),
        ([f"{KEY}.name=number"], "name=number is not a function"),
        ([f"{KEY}.name=takes_too_little"], r"cannot be called as.*unexpected keyword.*def takes_too_little\("),
        ([f"{KEY}.name=wants_more"], "missing a required argument: 'tokenizer'"),
        ([f"+{KEY}.reward_kwargs.bonus=1"], "unexpected keyword argument 'bonus'"),
        ([f"{KEY}.name=later", "reward.reward_manager.name=remote"], "remote does not support async functions"),
        (["reward.reward_model.enable=true"], r"reward\.reward_model\.enable=true: .*no accuracy"),
        (["reward_model.enable=true"], r"reward_model\.enable is an old name.*set reward\.reward_model\.enable"),
        (["reward_model.reward_manager=naive"], r"set reward\.reward_manager\.name"),
        (["reward_model.model.path=/a"], r"reward_model\.model\.path is an old name"),
        (["custom_reward_function.path=/a.py"], r"set reward\.custom_reward_function\.path"),
        (["sandbox_fusion.url=http://a"], r"set reward\.sandbox_fusion\.url"),
    ],
)  # fmt: skip
def test_a_reward_that_cannot_be_is_refused_in_a_line(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said) as caught:
        settled(tmp_path, *overrides)
    assert "\n" not in str(caught.value)


def test_a_module_that_raises_is_told_with_its_line(tmp_path):
    with pytest.raises(ConfigError, match=r"reward\.py.*SyntaxError"):
        settled(tmp_path, body="return )")
    own = tmp_path / "raising.py"
    own.write_text("import math\n\nmath.nothing\n")
    with pytest.raises(ConfigError, match=rf"cannot be loaded: {own}:3: AttributeError"):
        settled(tmp_path, f"{KEY}.path={own}")
    own.write_text("import sys\n\nsys.exit(0)\n")  # the end of a script, which would end the command as well
    with pytest.raises(ConfigError, match=rf"cannot be loaded: {own}:3: SystemExit"):
        settled(tmp_path, f"{KEY}.path={own}")


def test_workers_get_the_file_s_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("reward.py", "~/reward.py", "file://reward.py"):
        assert settled(tmp_path, f"{KEY}.path={named}") == str(tmp_path / "reward.py")
    assert settled(tmp_path, f"{KEY}.path=pkg://verl_aqn.bench.letters").startswith("pkg://")


def test_before_and_after_are_compared_only_where_every_judgement_is_on_record(tmp_path):
    (tmp_path / "validation").mkdir()
    for step, accs in ((0, [0, 0.0, False]), (2, [1, 1.0, True])):
        lines = [{"input": f"{n}?", "gts": "1", "output": "", "acc": acc} for n, acc in enumerate(accs)]
        (tmp_path / f"validation/{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare_validations(RunFolder(tmp_path), 0, 2)
    assert (found.n, found.before, found.after, found.left_out) == (3, 0.0, 1.0, 0)
    folder = RunFolder(tmp_path)
    for step in (0, 2):  # a fourth problem's answer failed
        folder.append("metrics.jsonl", {"kind": "validation", "step": step, "items": 4})
    assert "on the same 3 items (1 more have no response in one of the two): " in compare_validations(folder, 0, 2).text
    for acc in (None, 0.5, -1):
        lines[1]["acc"] = acc
        (tmp_path / "validation/2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert compare_validations(RunFolder(tmp_path), 0, 2) is None
