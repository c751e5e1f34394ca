"""verl's workers with what a run must prove: the base that they hold, the adapter that they sent."""

import ray
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_aqn.errors import AqnError
from verl_aqn.integrations.verl.process_group import open_process_group
from verl_aqn.integrations.verl.sync import watch_sync
from verl_aqn.integrations.verl.sync_socket import of_this_run
from verl_aqn.integrations.verl.verl_plugin import assert_loaded
from verl_aqn.noise.spec import NoiseOrder
from verl_aqn.preflight.peak import memory_peak
from verl_aqn.runs.checkpoints import weights_only


class AqnTrainingWorker(TrainingWorker):
    """One trained model."""

    def __init__(self, config):
        assert_loaded("training worker")
        # verl imports a model's external_lib where its config is made: for a critic that is not the worker's process.
        import verl_aqn.integrations.verl.engine  # noqa: F401

        open_process_group()
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, *arguments, **named):
        """As verl's, of weights only."""
        with weights_only():
            return super().load_checkpoint(*arguments, **named)


class AqnActorWorker(ActorRolloutRefWorker):
    """Actor and its side of the rollout."""

    actor_worker_cls = AqnTrainingWorker
    ref_worker_cls = AqnTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        """As verl's, with a socket to the rollout that no other run has; a rollout that fails ends a sync at once."""
        super().init_model()
        if self.rollout is not None:  # an actor's or a rollout's, not a reference policy's
            self.rollout.zmq_handle = of_this_run(self.rollout.zmq_handle)
            watch_sync(self.rollout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def node(self) -> str:
        """Address of the node that this rank is on."""
        return ray.util.get_node_ip_address()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def base(self) -> dict:
        """What this rank of the actor holds of the base; the first rank tells every tensor."""
        return self.actor.engine.base(every=self.rank == 0)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def layout(self) -> str:
        """How the actor lays batches out, and why not otherwise, in one line."""
        return self.actor.engine.layout

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def expect_slices(self, slicings: list[dict]) -> None:
        """Tell the parts of the adapter that the rollout's ranks hold: `sent_adapters` has a digest for each."""
        self.actor.engine.expect_slices(tuple(slicings))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def sent_adapters(self) -> tuple[list[str], int]:
        """Of the adapter that was last sent: digests, in the form and the parts that the rollout holds it in; bytes."""
        return list(self.actor.engine.sent_adapters), self.actor.engine.sent_bytes

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def memory_peak(self) -> dict[str, int]:
        """The most memory of this process so far, in bytes: `resident`, and `device` where it computes on one."""
        return memory_peak()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def cannot_carry_noise(self, order: dict) -> str:
        """Why this actor's norms cannot have the noise of `order`, in one line; "" where they can."""
        if (noise := self.actor.engine.noise) is None:
            return "its norms were not prepared for noise"
        try:
            noise.describe(NoiseOrder.from_dict(order))
        except AqnError as error:
            return str(error)
        return ""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def apply_noise(self, order: dict) -> dict:
        """The rollout's noise in this actor's forward from now on; evidence as the rollout's."""
        return self.actor.engine.noise.apply(NoiseOrder.from_dict(order))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restore_clean(self) -> dict:
        """No noise from now on; evidence, and how many forwards had it (`uses`)."""
        noise = self.actor.engine.noise
        return {"uses": noise.uses(), **noise.restore()}
