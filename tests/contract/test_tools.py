"""Tools: verl's agent loop with our calculator, verl's form of a conversation, and what is rejected before a run."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from verl_aqn.cache import cache_dir
from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError
from verl_aqn.integrations.verl.ask_tools import answer
from verl_aqn.integrations.verl.calculator import calculator, text_of, value_of
from verl_aqn.preflight.agent_tools import SINGLE, loops_of, prepare_tools
from verl_aqn.tasks.smollm2 import embedded_model
from verl_aqn.tasks.word_problems import problems, prompt

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture(scope="module")
def items() -> SimpleNamespace:
    return SimpleNamespace(rows=datasets.Dataset.from_list([{"prompt": prompt("1 + 1?", tool=True)}]))


@pytest.mark.parametrize(
    ("expression", "value"),
    [("9 - 4", "5"), ("3*(2+4)", "18"), ("7/2", "3.5"), ("1/3", "0.333333"), ("-3", "-3"), ("1,000 + 1", "1001")],
)
def test_the_calculator_computes(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "2 **", "2 ** 9", "9**9**9**9", "1/0", "__import__('os')", "True + 1", "'a' * 9", "1e308 * 10", "9" * 65,
     "(" * 60, "[1]", "print(1)", None, "a", "1e400 - 1e400"],
)  # fmt: skip
def test_the_calculator_says_what_is_wrong_and_runs_nothing_else(expression):
    assert calculator(expression).startswith("error: ")


def test_integers_stay_exact():
    assert text_of(value_of("12345678901234567890 + 1")) == "12345678901234567891"


def test_what_a_tool_says_is_masked_and_everything_else_is_what_the_policy_sampled(items, monkeypatch):
    """verl's own tool agent loop runs with a server that answers from a script."""
    from verl.experimental.agent_loop.agent_loop import ToolListWrap
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY
    from verl.tools.tool_registry import load_all_tools

    monkeypatch.delitem(
        FUNCTION_TOOL_REGISTRY, "calculator"
    )  # registered by this file's own import; verl rejects a second registration
    tokenizer = AutoTokenizer.from_pretrained(embedded_model(cache_dir() / "models"))
    config = load_recipe("multi_turn", ["profile=cpu"])
    prepare_tools(config, items)
    assert Path(config.actor_rollout_ref.rollout.multi_turn.function_tool_path).name == "calculator.py"
    told = [f"{CALL % '4 + 5'}<|im_end|>", "#### 9<|im_end|>"]
    sampled = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in told]
    seen = []

    class Server:
        async def generate(self, prompt_ids, **kwargs):
            from verl.workers.rollout.replica import TokenOutput

            ids = sampled[len(seen)]
            seen.append(list(prompt_ids))
            return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids))

    tools = load_all_tools(None, config.actor_rollout_ref.rollout.multi_turn.function_tool_path)
    loop = made(ToolAgentLoop, config, tokenizer, Server(), ToolListWrap(tools))
    question = problems(1, "test", 0)[0].question
    output = asyncio.run(loop(raw_prompt=prompt(question, tool=True)))
    kept = [token for token, own in zip(output.response_ids, output.response_mask, strict=True) if own]
    assert kept == [*sampled[0], *sampled[1]]
    masked = [token for token, own in zip(output.response_ids, output.response_mask, strict=True) if not own]
    # verl has no parser for llama's format, and omits the template's line break after <|im_end|> (docs/workloads.md).
    assert tokenizer.decode(masked) == "<|im_start|>tool\n9<|im_end|>\n<|im_start|>assistant\n"
    own = torch.tensor(output.response_mask).bool()
    assert set(torch.tensor(output.response_logprobs)[own].tolist()) == {-0.5}
    assert seen[1] == [*output.prompt_ids, *output.response_ids[: len(sampled[0]) + len(masked)]]  # one context
    assert output.num_turns == 4


def made(cls, config, tokenizer, server, tools):
    """Return a function that runs the agent loop `cls`, created as verl's worker creates it."""
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap
    from verl.utils.dataset.rl_dataset import RLHFDataset

    async def run(**row):
        config.actor_rollout_ref.model.path = str(tokenizer.name_or_path)
        loop = cls(
            trainer_config=DictConfigWrap(config),
            server_manager=server,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(config.data),
            tools=tools,
        )
        return await loop.run({"temperature": 1.0}, **row)

    return run


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "cispo"])
def test_masked_tokens_are_in_no_loss(mode):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import FSDPActorConfig

    actor = OmegaConf.to_container(load_recipe("grpo", ["profile=cpu"]).actor_rollout_ref.actor, resolve=True)
    settings = {key: actor[key] for key in ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "loss_agg_mode")}
    config = FSDPActorConfig(**settings, rollout_n=2, strategy="fsdp2", use_dynamic_bsz=True)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0]])
    old, advantages = torch.randn(2, 6, generator=torch.manual_seed(0)), torch.randn(2, 6)
    losses = []
    for other in (0.0, 3.0):
        new = (old + 0.01 + other * (1 - mask)).requires_grad_()
        loss, _ = get_policy_loss_fn(mode)(
            old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask.float(),
            loss_agg_mode="token-mean", config=config,
        )  # fmt: skip
        loss.backward()
        assert new.grad[mask == 0].abs().max() == 0
        assert new.grad[mask == 1].abs().min() > 0
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-7)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([f"{ROLLOUT}.multi_turn.function_tool_path=/nowhere.py"], "/nowhere.py: this file does not exist"),
        ([f"{ROLLOUT}.multi_turn.function_tool_path=pkg://verl_aqn.nothing"], "module verl_aqn.nothing does not exist"),
        ([f"{ROLLOUT}.multi_turn.function_tool_path=null"], "default_agent_loop=tool_agent has no tool"),
        ([f"{ROLLOUT}.multi_turn.format=herms"], "multi_turn.format=herms is not known: verl knows"),
        ([f"{ROLLOUT}.agent.default_agent_loop=tools"], "there is no agent loop 'tools': verl has single_turn_agent"),
        ([f"{ROLLOUT}.agent.default_agent_loop=single_turn_agent"], "generates one response and calls no tool"),
    ],
)
def test_tools_that_would_fail_or_never_be_called_are_refused(items, overrides, text, monkeypatch):
    monkeypatch.setattr(
        "verl_aqn.preflight.agent_tools.ask_module",
        lambda module, about, arguments, **_: answer(json.loads(*arguments)),
    )
    check_refused(items, overrides, text)


def test_a_module_without_a_tool_is_refused_in_a_process_of_its_own(items):
    check_refused(
        items,
        [f"{ROLLOUT}.multi_turn.function_tool_path=pkg://verl_aqn.errors"],
        "has no tool: put @function_tool",
    )


def check_refused(items, overrides, text):
    config = load_recipe("multi_turn", ["profile=cpu", *overrides])
    with pytest.raises(ConfigError, match="actor_rollout_ref") as error:
        prepare_tools(config, items)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_without_tools_asks_nothing(items, monkeypatch):
    monkeypatch.setattr("verl_aqn.preflight.agent_tools.ask_module", None)
    prepare_tools(load_recipe("e12", ["profile=cpu"]), items)


def test_a_tool_that_raises_as_it_is_loaded_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import nothing_like_this\n")
    request = {"loops": ["tool_agent"], "format": "hermes", "own": None, "tool_config_path": None}
    found = answer(request | {"function_tool_path": str(file)})
    assert "mine.py cannot be loaded: ModuleNotFoundError: No module named 'nothing_like_this'" in found["fault"]


def test_the_tool_of_the_docs_is_loaded(tmp_path):
    text = (Path(__file__).parents[2] / "docs/workloads.md").read_text()
    file = tmp_path / "my_tools.py"
    file.write_text(text.split("```python\n")[1].split("```")[0])
    request = {"loops": ["tool_agent"], "format": "hermes", "own": None, "tool_config_path": None}
    assert answer(request | {"function_tool_path": str(file)}) == {"fault": "", "tools": ["lookup"]}


def test_a_row_may_name_its_agent_loop():
    rows = SimpleNamespace(rows=datasets.Dataset.from_list([{"agent_name": "tool_agent"}, {"agent_name": SINGLE}]))
    config = load_recipe("e12", ["profile=cpu"])
    assert loops_of(config, rows) == {"tool_agent", SINGLE}
    with pytest.raises(ConfigError, match="has no tool"):
        prepare_tools(config, rows)
