"""verl's vLLM replica with a way to ask the engine's workers and get their answers."""

import asyncio
import inspect
import os
from typing import Any

import ray
from verl.utils.tracking import RLInsightLogger
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout import vllm_async_server
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_aqn.config.serving import SERVED
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.verl_plugin import assert_loaded
from verl_aqn.runs.request_seeds import turn_seed


class AqnHttpServer(vLLMHttpServer):
    """verl's `collective_rpc` drops the answers; this one returns them."""

    _server_address: str  # where verl's own servers listen: the node's address
    asked_by_http = False

    def __init__(self, *args, **kwargs):
        assert_loaded("rollout server")
        super().__init__(*args, **kwargs)
        # verl has one path for actor and rollout; the base may be served in another form than the actor trains on.
        self.model_config.local_path = self.model_config.override_config.get(SERVED, self.model_config.local_path)

    async def run_server(self, args):
        """Without verl's HTTP server, which answers anybody: a run asks the engine through Ray.

        Only what collects metrics and a reward model are asked by HTTP; then it listens on loopback alone.
        """
        asked = self.asked_by_http or self.config.prometheus.enable or RLInsightLogger.enabled()
        address, self._server_address = self._server_address, "127.0.0.1"
        verls = vllm_async_server.run_uvicorn
        if not asked:
            vllm_async_server.run_uvicorn = _serve_nobody
        try:
            await super().run_server(args)
        finally:
            vllm_async_server.run_uvicorn = verls
            self._server_address = address  # which is also the replica's name, and that of its ranks' group

    async def generate(self, *args, **kwargs):
        """As verl's; each turn of a session with a seed draws random numbers of its own."""
        asked = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        if (seed := asked["sampling_params"].get("seed")) is not None:
            asked["sampling_params"] = asked["sampling_params"] | {"seed": turn_seed(seed, len(asked["prompt_ids"]))}
        return await super().generate(**asked)

    async def aqn_call(self, method: str, *args: Any, clear_cache: bool = False) -> list[Any]:
        """Call `method` on every rank of the engine.

        Args:
            clear_cache: also drop cached prefixes, which were computed with the weights of before.
        """
        answers = await self.engine.collective_rpc(method=method, args=args)
        if clear_cache:
            await self.clear_kv_cache()
            await self.check_prefixes()
        return answers

    async def check_prefixes(self) -> None:
        """EvidenceError where vLLM keeps prefixes, as it does while one is in use: verl drops what it answers."""
        for _ in range(20):  # those of an answer that has just come may be given back a moment later
            if await self.engine.reset_prefix_cache(reset_connector=True):
                return
            await asyncio.sleep(0.1)
        raise EvidenceError("vLLM keeps prefixes that were computed with other weights: requests are under way")


async def _serve_nobody(app: Any, args: Any, address: str) -> tuple[int, None]:
    """In the place of verl's `run_uvicorn`; the port, a part of the replica's name, is another number of its own."""
    return os.getpid(), None


class AqnRewardServer(AqnHttpServer):
    """verl's router asks a reward model by HTTP."""

    asked_by_http = True


class AqnReplica(vLLMReplica):
    """One rollout replica."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(AqnRewardServer if self.is_reward_model else AqnHttpServer)


RolloutReplicaRegistry.register("vllm", lambda: AqnReplica)
