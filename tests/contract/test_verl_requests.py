"""What verl's agent loop sends to the rollout for each response: a seed that depends only on the response's names."""

import asyncio
import inspect
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_aqn.runs.request_seeds import request_seed, turn_seed

SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": -1, "logprobs": True}
EVERY_PART = [
    ("train", 1, "5", 0),
    ("train", 1, "5", 1),
    ("train", 1, "5+1", 0),
    ("train", 2, "5", 0),
    ("val", 1, "5", 0),
]


@pytest.fixture
def parameters_of(monkeypatch):
    """`parameters_of(seed, …)`: the sampling parameters with which a session of our worker begins."""
    from verl_aqn.config.schema import AqnConfig
    from verl_aqn.integrations.verl import keyed

    async def session(self, sampling_params, trajectory, **kwargs):
        assert kwargs.keys() == {"agent_name", "trace", "session_id", "uid"}, "a loop gets what verl gives it"
        return sampling_params

    monkeypatch.setattr(keyed._Worker, "_run_agent_loop", session)

    def ask(seed, part, step, prompt, sample, on=True):
        worker = keyed.AqnAgentLoopWorker.__new__(keyed.AqnAgentLoopWorker)
        worker.aqn = AqnConfig(seed=seed, request_seeds=on)
        trajectory = {"step": step, "sample_index": 0, "rollout_n": 0, "validate": part == "val"}
        names = {"agent_name": "single_turn_agent", "trace": False, "session_id": sample, "uid": "u"}
        return asyncio.run(worker._run_agent_loop(SAMPLING, trajectory, **names, aqn_prompt=prompt))

    return ask


def test_each_request_has_the_seed_of_run_part_step_prompt_and_sample(parameters_of):
    found = [parameters_of(seed, *parts) for seed in (0, 1) for parts in EVERY_PART]
    assert [one["seed"] for one in found] == [request_seed(seed, *parts) for seed in (0, 1) for parts in EVERY_PART]
    assert len({one["seed"] for one in found}) == 2 * len(EVERY_PART)
    assert all({key: one[key] for key in SAMPLING} == SAMPLING for one in found)
    assert "seed" not in SAMPLING, "sessions of a prompt share this"


def test_without_request_seeds_verl_s_parameters_are_left_alone(parameters_of):
    assert parameters_of(0, *EVERY_PART[0], on=False) == SAMPLING


@pytest.mark.parametrize("by_name", [True, False])
def test_turns_of_a_session_draw_other_numbers_and_a_request_without_a_seed_stays_so(monkeypatch, by_name):
    from verl_aqn.integrations.verl import rollout

    async def generate(self, prompt_ids, sampling_params, request_id):
        return sampling_params

    monkeypatch.setattr(rollout.vLLMHttpServer, "generate", generate)
    server = rollout.AqnHttpServer.__new__(rollout.AqnHttpServer)

    def ask(prompt, params):
        if by_name:
            return asyncio.run(server.generate(request_id="r", prompt_ids=prompt, sampling_params=params))
        return asyncio.run(server.generate(prompt, params, "r"))

    params = {"temperature": 1.0, "seed": 7}
    assert [ask([1] * n, params)["seed"] for n in (3, 5)] == [turn_seed(7, 3), turn_seed(7, 5)]
    assert params == {"temperature": 1.0, "seed": 7}
    asked = ask([1], {"temperature": 1.0})
    assert (asked["temperature"], "seed" in asked) == (1.0, False)


@pytest.mark.parametrize(("stop", "text"), [({}, False), ({"stop": None}, False), ({"stop": ["."]}, True)])
def test_verl_takes_the_last_output_alone_and_never_its_text(monkeypatch, stop, text):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from verl_aqn.integrations.verl import rollout

    source = inspect.getsource(rollout.vLLMHttpServer.generate)
    assert "final_res = output\n" in source
    assert ".text" not in source

    async def generate(self, prompt_ids, sampling_params):
        return SamplingParams(**sampling_params)  # refuses stop strings without text

    monkeypatch.setattr(rollout.vLLMHttpServer, "generate", generate)
    server = rollout.AqnHttpServer.__new__(rollout.AqnHttpServer)
    params = asyncio.run(server.generate([1], {"temperature": 1.0, **stop}))
    assert (params.output_kind, params.detokenize) == (RequestOutputKind.FINAL_ONLY, text)


def test_the_manager_starts_our_workers_and_knows_the_rows_behind_validation_s_uids(monkeypatch):
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

    from verl_aqn.integrations.verl.keyed import AqnAgentLoopManager, AqnAgentLoopWorker

    sent = []
    monkeypatch.setattr(AgentLoopManagerTQ, "generate_sequences", lambda self, prompts: sent.append(prompts))
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {}, "model": {}}})
    manager = AqnAgentLoopManager(config=config, llm_client=SimpleNamespace())
    assert issubclass(manager.agent_loop_workers_class.__ray_actor_class__, AqnAgentLoopWorker)
    val = {"uid": ["a", "b"], "aqn_prompt": ["7", "0"], "validate": True}
    manager.generate_sequences(val)
    manager.generate_sequences({"uid": ["1-0-3"], "aqn_prompt": ["3"]})
    assert manager.row_of == {"a": 7, "b": 0}
    assert len(sent) == 2
