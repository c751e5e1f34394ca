"""verl's vLLM replica, extended so that a run can call the engine's workers and get their answers."""

import asyncio
import inspect
import os
from typing import Any

import ray
from verl.utils.tracking import RLInsightLogger
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout import vllm_async_server
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.sampling_params import RequestOutputKind

from verl_aqn.config.serving import SERVED
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.verl_plugin import assert_loaded
from verl_aqn.runs.request_seeds import turn_seed


class AqnHttpServer(vLLMHttpServer):
    """verl's server, extended by calls that return the workers' answers; verl's `collective_rpc` drops them."""

    _server_address: str  # the address at which verl's own servers listen: the node's
    serves_http = False

    def __init__(self, *args, **kwargs):
        assert_loaded("rollout server")
        super().__init__(*args, **kwargs)
        # verl has one path for actor and rollout, but the rollout may hold the base in another form than the actor.
        self.model_config.local_path = self.model_config.override_config.get(SERVED, self.model_config.local_path)

    async def run_server(self, args):
        """Start the engine without verl's HTTP server, which would serve anybody; a run calls the engine through Ray.

        The HTTP server is needed only for metrics collectors and for a reward model; then it listens only on loopback.
        """
        needs_server = self.serves_http or self.config.prometheus.enable or RLInsightLogger.enabled()
        address, self._server_address = self._server_address, "127.0.0.1"
        verls = vllm_async_server.run_uvicorn
        if not needs_server:
            vllm_async_server.run_uvicorn = _serve_nobody
        try:
            await super().run_server(args)
        finally:
            vllm_async_server.run_uvicorn = verls
            self._server_address = address  # verl also uses it in the name of the replica and of its ranks' group

    async def generate(self, *args, **kwargs):
        """Generate as verl does, but with a separate seed for each turn of a session that has a seed.

        verl takes the tokens of the last output, and drops the text and all outputs before it, of which vLLM makes one
        for each token. So ask for the last one, and for text only if a stop string needs it.
        """
        arguments = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        params = arguments["sampling_params"]
        own = {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": bool(params.get("stop"))}
        if (seed := params.get("seed")) is not None:
            own["seed"] = turn_seed(seed, len(arguments["prompt_ids"]))
        arguments["sampling_params"] = params | own
        return await super().generate(**arguments)

    async def aqn_call(self, method: str, *args: Any, clear_cache: bool = False) -> list[Any]:
        """Call `method` on every rank of the engine.

        Args:
            clear_cache: also drop cached prefixes, which were computed with the earlier weights.
        """
        answers = await self.engine.collective_rpc(method=method, args=args)
        if clear_cache:
            await self.clear_kv_cache()
            await self.check_prefixes()
        return answers

    async def check_prefixes(self) -> None:
        """Raise EvidenceError if vLLM keeps cached prefixes because a request uses them; verl does not check this."""
        for _ in range(20):  # vLLM may free the prefixes of a finished request a moment later
            if await self.engine.reset_prefix_cache(reset_connector=True):
                return
            await asyncio.sleep(0.1)
        raise EvidenceError("vLLM keeps prefixes that were computed with other weights: requests are still running")


async def _serve_nobody(app: Any, args: Any, address: str) -> tuple[int, None]:
    """Replace verl's `run_uvicorn`; instead of the port, which is part of the replica's name, return the process id."""
    return os.getpid(), None


class AqnRewardServer(AqnHttpServer):
    """The server of a reward model, which verl's router calls by HTTP."""

    serves_http = True


class AqnReplica(vLLMReplica):
    """One rollout replica."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(AqnRewardServer if self.is_reward_model else AqnHttpServer)


RolloutReplicaRegistry.register("vllm", lambda: AqnReplica)
