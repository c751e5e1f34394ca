"""verl's workers with what a run must prove: the base that they hold, the adapter that they sent."""

import os

import torch.distributed
import zmq
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_aqn.errors import EvidenceError
from verl_aqn.order import NoiseOrder
from verl_aqn.verl_api.plugin import assert_loaded

SYNC_TIMEOUT_S = 600


class AqnTrainingWorker(TrainingWorker):
    """One trained model. On a CPU it makes the process group that verl's own string would break."""

    def __init__(self, config):
        assert_loaded("training worker")
        # verl imports a model's external_lib where its config is made: for a critic that is not the worker's process.
        import verl_aqn.verl_api.engine  # noqa: F401

        if os.environ.get("VERL_PLATFORM") == "cpu" and not torch.distributed.is_initialized():
            # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses; it keeps a group that exists.
            torch.distributed.init_process_group(
                "gloo", rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1))
            )
        super().__init__(config)


class AqnActorWorker(ActorRolloutRefWorker):
    """Actor and its side of the rollout."""

    actor_worker_cls = AqnTrainingWorker
    ref_worker_cls = AqnTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def base_digest(self) -> str | None:
        """Digest of the packed base in the actor, or None for an unquantised one."""
        return self.actor.engine.base_digest()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def activations(self) -> list[str]:
        """How the actor's packed layers round their inputs."""
        return self.actor.engine.activations()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def expect_slices(self, slicings: list[dict]) -> None:
        """Which parts of the adapter the rollout's ranks hold: from now on `sent_adapters` has a digest for each."""
        self.actor.engine.slicings = tuple(slicings)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def sent_adapters(self) -> list[str]:
        """Digests of the adapter that was last sent, in the form and the parts that the rollout holds it in."""
        return list(self.actor.engine.sent_adapters)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def apply_noise(self, order: dict) -> dict:
        """The rollout's noise in this actor's forward from now on; evidence as the rollout's."""
        return self.actor.engine.noise.apply(NoiseOrder.from_dict(order))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restore_clean(self) -> dict:
        """No noise from now on; evidence, and how many forwards had it (`uses`)."""
        noise = self.actor.engine.noise
        return {"uses": noise.uses(), **noise.restore()}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL, blocking=False)
    async def update_weights(self, global_steps: int | None = None, mode: str = "auto"):
        """As verl's, but a rollout worker that died does not make the run wait for ever."""
        context: zmq.Context = zmq.Context.instance()
        context.setsockopt(zmq.RCVTIMEO, SYNC_TIMEOUT_S * 1000)
        try:
            return await super().update_weights(global_steps=global_steps, mode=mode)
        except zmq.Again:
            raise EvidenceError(
                f"the rollout did not take the adapter within {SYNC_TIMEOUT_S} s: its worker has failed (see the log)"
            ) from None
        finally:
            context.setsockopt(zmq.RCVTIMEO, -1)
