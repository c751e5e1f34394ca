"""verl's reward managers with a user's function: our check before a run calls it as they do, and checks its result."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager

from tests.helpers.composed import recipe_with
from verl_aqn.config.allowed import REWARD_MANAGERS
from verl_aqn.errors import RewardError
from verl_aqn.integrations.verl.rewarding import use_telling_manager
from verl_aqn.preflight.reward_function import GIVEN, added_by_manager

FUNCTION = """
CALLS = []
def compute_score(**told):
    CALLS.append(told)
    return {body}
async def later(**told):
    return compute_score(**told)
def deep(**told):
    return int(told["solution_str"])
"""
HERE = [name for name in REWARD_MANAGERS if name != "remote"]  # this manager starts processes: see tests/integration


@pytest.fixture
def manager(tmp_path):
    def made(name, body="{'score': 0.5, 'acc': 1}", function="compute_score", *more):
        file = tmp_path / "reward.py"
        file.write_text(FUNCTION.replace("{body}", body))
        keys = f"reward.custom_reward_function.path={file}", f"reward.custom_reward_function.name={function}"
        config = recipe_with("e12", f"reward.reward_manager.name={name}", *keys, *more)
        config = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        use_telling_manager(config)
        tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "seventy-two")
        return config, load_reward_manager(config, tokenizer)

    return made


def score(manager):
    ids = torch.ones(1, 4, dtype=torch.int64)
    data = DataProto.from_dict(
        tensors={"prompts": ids, "responses": ids, "attention_mask": torch.ones(1, 8, dtype=torch.int64)},
        non_tensors={
            "data_source": np.array(["s"], dtype=object), "extra_info": np.array([{"index": 3}], dtype=object),
            "reward_model": np.array([{"ground_truth": "72"}], dtype=object), "__num_turns__": np.array([2]),
        },
    )  # fmt: skip
    return asyncio.run(_score(manager, data))


async def _score(manager, data):
    manager.loop = asyncio.get_running_loop()
    return await manager.run_single(data)


@pytest.mark.parametrize("name", HERE)
def test_each_manager_calls_as_our_check_does_and_hands_accuracy_on(manager, name):
    config, made = manager(name)
    assert type(made).__name__.startswith("Telling")
    found = score(made)
    assert (found["reward_score"], found["reward_extra_info"]["acc"]) == (0.5, 1)
    (told,) = made.compute_score.args[0].args[0].__globals__["CALLS"]
    assert sorted(told) == sorted(GIVEN)
    before = OmegaConf.merge(config, {"reward": {"reward_manager": {"name": name}}})
    assert set(told["extra_info"]) == {"index", *added_by_manager(before)}


@pytest.mark.parametrize("name", HERE)
def test_an_async_function_is_awaited(manager, name):
    assert score(manager(name, "1.0", "later")[1])["reward_extra_info"] == {"acc": 1.0}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("function", ["compute_score", "later", "deep"])
def test_a_function_that_raises_is_told_with_its_line(manager, name, function, tmp_path):
    with pytest.raises(RewardError) as caught:
        score(manager(name, "told['nothing']", function)[1])
    line = 9 if function == "deep" else 5
    error = "ValueError: invalid literal for int()" if function == "deep" else "KeyError: 'nothing'"
    assert str(caught.value).startswith(f"{tmp_path}/reward.py:{line}: {error}")


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("body", ["None", "'1.0'", "float('nan')", "{'acc': 1}", "{'score': None, 'acc': 1}", "[1.0]"])
def test_what_is_no_reward_is_refused_as_it_is_returned(manager, name, body):
    with pytest.raises(RewardError, match="has no finite number as the reward"):
        score(manager(name, body)[1])


@pytest.mark.parametrize("name", HERE)
def test_a_function_may_return_a_column_with_the_name_error(manager, name):
    found = score(manager(name, "{'score': 1.0, 'acc': 1, 'error': 'the unit is missing'}")[1])
    assert (found["reward_score"], found["reward_extra_info"]["error"]) == (1.0, "the unit is missing")


def test_the_penalty_for_long_responses_stays_verl_s(manager):
    long = "data.max_response_length=4", "reward.reward_kwargs.overlong_buffer_cfg.len=2"
    assert math.isclose(score(manager("dapo", "1.0", "compute_score", *long)[1])["reward_score"], 0.5)


def test_a_manager_of_the_user_s_own_is_left_alone():
    config = OmegaConf.create({"reward": {"reward_manager": {"source": "importlib", "name": "Mine", "module": {}}}})
    before = OmegaConf.to_container(config)
    use_telling_manager(config)
    assert OmegaConf.to_container(config) == before
