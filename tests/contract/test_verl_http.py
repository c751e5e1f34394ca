"""verl's HTTP server beside an engine: what starts it, that a run uses Ray instead, and who can still use it."""

import ast
import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import verl

ROOT = Path(verl.__file__).parent
# The code that generates a run's responses. Reward model and metric collectors are elsewhere in verl.
ASKING = (
    "experimental/agent_loop/agent_loop.py",
    "experimental/agent_loop/single_turn_agent_loop.py",
    "experimental/agent_loop/tool_agent_loop.py",
    "experimental/teacher_loop/teacher_manager.py",
    "trainer/ppo/v1/agent_loop_tq.py",
    "workers/rollout/llm_server.py",
)


@pytest.mark.parametrize("file", ASKING)
def test_answers_are_asked_for_through_ray(file):
    tree = ast.parse((ROOT / file).read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    assert not {name.partition(".")[0] for name in names} & {"aiohttp", "httpx", "http", "openai", "requests", "urllib"}


@pytest.fixture
def serve(monkeypatch):
    """`serve(…)`: the server after its start, without verl's start of the engine, and the address where it listened."""
    from verl_aqn.integrations.verl import rollout

    real, listened = rollout.vLLMHttpServer.run_server, []
    assert "run_uvicorn" in real.__code__.co_names, "the name that is replaced in verl's module"

    async def uvicorn(app, args, address):
        listened.append(address)
        return 8000, "task"

    async def run_server(self, args):
        found = await rollout.vllm_async_server.run_uvicorn("app", args, self._server_address)
        self._server_port, self._server_task = found

    monkeypatch.setattr(rollout.vllm_async_server, "run_uvicorn", uvicorn)
    monkeypatch.setattr(rollout.vLLMHttpServer, "run_server", run_server)

    def start(cls="AqnHttpServer", prometheus=False):
        server = getattr(rollout, cls).__new__(getattr(rollout, cls))
        server.config = SimpleNamespace(prometheus=SimpleNamespace(enable=prometheus))
        server._server_address = "10.0.0.1"
        asyncio.run(server.run_server(None))
        assert rollout.vllm_async_server.run_uvicorn is uvicorn
        return server, listened

    return start


def test_nothing_listens_where_nobody_asks(serve):
    server, listened = serve()
    assert listened == []
    assert server.get_server_address() == ("10.0.0.1", os.getpid())  # its name stands for one process on one node


@pytest.mark.parametrize("who", ["prometheus", "rl_insight", "reward model"])
def test_who_asks_is_answered_on_loopback(serve, monkeypatch, who):
    if who == "rl_insight":
        from verl.utils.tracking import RLInsightLogger

        monkeypatch.setenv(RLInsightLogger.ENABLE_ENV, "1")
    cls = "AqnRewardServer" if who == "reward model" else "AqnHttpServer"
    server, listened = serve(cls, prometheus=who == "prometheus")
    assert listened == ["127.0.0.1"]
    assert server.get_server_address() == ("10.0.0.1", 8000)


def test_a_reward_models_replica_has_the_server_that_is_asked(monkeypatch):
    from verl_aqn.integrations.verl import rollout

    def init(self, reward):
        self.is_reward_model = reward

    monkeypatch.setattr(rollout.vLLMReplica, "__init__", init)
    classes = [rollout.AqnReplica(reward).server_class.__ray_actor_class__ for reward in (False, True)]
    assert classes == [rollout.AqnHttpServer, rollout.AqnRewardServer]


@pytest.mark.parametrize("user_says", [None, "1"])
def test_nobody_may_load_adapters_by_http(monkeypatch, tmp_path, user_says):
    from fastapi import FastAPI
    from vllm.entrypoints.serve.lora.api_router import attach_router

    from verl_aqn.cluster.process_environment import engine_environment

    name = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    if user_says:
        monkeypatch.setenv(name, user_says)
    env = engine_environment(str(tmp_path), cpu=True, ranks=1)

    def paths(value: str) -> set[str]:
        monkeypatch.setenv(name, value)
        attach_router(app := FastAPI())
        return {route.path for route in app.routes}

    assert "/v1/load_lora_adapter" not in paths(env[name])
    assert "/v1/load_lora_adapter" in paths("1"), "the route whose absence is checked"
