"""verl's actor worker and vLLM server for a stock run, extended only by methods that report their state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.device import get_device_name
from verl.utils.model import convert_weight_keys
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.replica import RolloutReplicaRegistry
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from verl_aqn.checkpoints.actual_adapter import ActualAdapter, actual_adapter
from verl_aqn.checkpoints.actual_base import actual_base
from verl_aqn.checkpoints.adapter import digest_name
from verl_aqn.checkpoints.slices import Slices, cut
from verl_aqn.config.stock_settings import model_folder
from verl_aqn.digest import tensor_digest


class StockActorWorker(ActorRolloutRefWorker):
    """verl's worker for the actor and its side of the rollout, extended by readings of base and adapter."""

    actual: ActualAdapter

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        """Initialise the model as verl does; on a CPU use verl's own engine, which verl registers for accelerators."""
        if get_device_name() == "cpu":
            _register_engine_for_cpu()
        super().init_model()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def node(self) -> str:
        """Return the address of this rank's node."""
        return ray.util.get_node_ip_address()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def base(self) -> dict[str, Any]:
        """Return what this rank holds of the base; only the first rank lists every tensor."""
        engine = self.actor.engine
        with on_device(engine):
            actual = actual_base(engine.module, model_folder(engine.model_config.local_path))._asdict()
        told = {key: value for key, value in actual.items() if self.rank == 0 or "digest" in key or key == "faults"}
        return told | {"activations": []}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def remember_adapter(self) -> None:
        """Copy this actor's adapter to the CPU, to compare it with the rollout's after the sync that follows."""
        with on_device(self.actor.engine):
            self.actual = actual_adapter(self.actor.engine.module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def adapter(self, dtype: str, slicings: list[Slices]) -> dict[str, Any]:
        """Return the digest of the remembered adapter in ``dtype``, and the digest of each of ``slicings``."""
        module = self.actor.engine.module
        named = convert_weight_keys(
            self.actual.served(getattr(torch, dtype)), getattr(module, "_fsdp_wrapped_module", module)
        )
        tensors = [(digest_name(name), tensor) for name, tensor in named.items()]
        return {
            "modules": len({name.rpartition(".")[0] for name, _ in tensors}),
            "digest": tensor_digest(tensors),
            "parts": [
                tensor_digest((name, cut(tensor, part.get(name))) for name, tensor in tensors) for part in slicings
            ],
            "bytes": sum(tensor.nbytes for _, tensor in tensors),
            "faults": self.actual.faults[:8],
        }


@contextmanager
def on_device(engine: Any) -> Iterator[None]:
    """Move the weights of ``engine`` to its device for the block, if the engine offloads them between steps."""
    if not engine.is_param_offload_enabled:
        yield
        return
    engine.to(device=get_device_name(), model=True, optimizer=False, grad=False)
    try:
        yield
    finally:
        engine.to(device="cpu", model=True, optimizer=False, grad=False)


def _register_engine_for_cpu() -> None:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    for backend in ("fsdp", "fsdp2"):
        EngineRegistry._engines["language_model"][backend].setdefault("cpu", FSDPEngineWithLMHead)


class StockHttpServer(vLLMHttpServer):
    """verl's server, which also counts requests with and without the adapter, and returns its workers' answers."""

    async def run_server(self, args):
        """Start the server as verl does, and count every request to the engine."""
        self.requests = {"with": 0, "without": 0}
        await super().run_server(args)
        generate = self.engine.generate

        def counted(*arguments: Any, lora_request: Any = None, **named: Any) -> Any:
            self.requests["without" if lora_request is None else "with"] += 1
            return generate(*arguments, lora_request=lora_request, **named)

        self.engine.generate = counted

    async def aqn_call(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` on every rank of the engine and return their answers, which verl's `collective_rpc` drops."""
        return await self.engine.collective_rpc(method=method, args=args)

    async def aqn_requests(self) -> dict[str, Any]:
        """Return whether the engine lists an adapter, and how many requests had one or not since the last call."""
        counts, self.requests = self.requests, {"with": 0, "without": 0}
        return {"listed": bool(await self.engine.list_loras()), **counts}


class StockReplica(vLLMReplica):
    """One rollout replica."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not (self.is_reward_model or self.is_teacher_model):
            self.server_class = ray.remote(StockHttpServer)


def register_replica() -> None:
    """Make verl create replicas of class `StockReplica` in this process from now on."""
    RolloutReplicaRegistry.register("vllm", lambda: StockReplica)
