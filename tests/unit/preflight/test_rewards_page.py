"""The example of docs/rewards.md, used as a reader would."""

import re
from pathlib import Path

import pytest

from verl_aqn.config.allowed import REWARD_MANAGERS
from verl_aqn.config.compose import load_recipe
from verl_aqn.preflight.reward_function import reward_of, settle_reward
from verl_aqn.preflight.run_data import prepare_data

PAGE = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text()


def test_the_example_is_taken_and_scores_as_it_says(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"```bash\nverl-aqn train (.*?)\n```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(code)
    recipe, *overrides = command.split()
    config = load_recipe(recipe, ["profile=cpu", *overrides])
    settle_reward(config)
    assert prepare_data(config).rows["test"] == 192
    score = reward_of(config)
    for text, expected, right in (("It is 72.", 1.0, 1), ("71", 0.1, 0), ("7", 0.0, 0), ("none", 0.0, 0)):
        found = score(data_source="a", solution_str=text, ground_truth="72", extra_info={})
        assert found == {"score": pytest.approx(expected), "acc": right}
    assert len(code.strip().splitlines()) <= 12


def test_every_manager_is_on_the_page():
    assert sorted(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)) == sorted(REWARD_MANAGERS)
