"""verl's workers, extended by readings for the evidence: the base that they hold, the adapter that they sent."""

import ray
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from verl_aqn.errors import AqnError
from verl_aqn.integrations.verl.process_group import open_process_group
from verl_aqn.integrations.verl.sync import watch_sync
from verl_aqn.integrations.verl.sync_socket import of_this_run
from verl_aqn.integrations.verl.verl_plugin import assert_loaded
from verl_aqn.noise.spec import NoiseSpec
from verl_aqn.preflight.peak import memory_peak
from verl_aqn.runs.checkpoints import weights_only


class AqnTrainingWorker(TrainingWorker):
    """The worker of one trained model."""

    def __init__(self, config):
        assert_loaded("training worker")
        # verl imports a model's external_lib where it creates the model's config; for a critic this is another process.
        import verl_aqn.integrations.verl.engine  # noqa: F401

        open_process_group()
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, *arguments, **named):
        """Load a checkpoint as verl does, with torch's `weights_only`."""
        with weights_only():
            return super().load_checkpoint(*arguments, **named)


class AqnActorWorker(ActorRolloutRefWorker):
    """The worker of the actor and its side of the rollout."""

    actor_worker_cls = AqnTrainingWorker
    ref_worker_cls = AqnTrainingWorker

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self):
        """Initialise as verl does, with a socket that no other run uses, and syncs that stop if the rollout fails."""
        super().init_model()
        if self.rollout is not None:  # a reference policy has none
            self.rollout.zmq_handle = of_this_run(self.rollout.zmq_handle)
            watch_sync(self.rollout)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def node(self) -> str:
        """Return the address of this rank's node."""
        return ray.util.get_node_ip_address()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def base(self) -> dict:
        """Return what this rank of the actor holds of the base; only the first rank lists every tensor."""
        return self.actor.engine.base(every=self.rank == 0)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def layout(self) -> str:
        """Return the layout of the actor's batches, with the reason, in one line."""
        return self.actor.engine.layout

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def expect_slices(self, slicings: list[dict]) -> None:
        """Set the parts of the adapter that the rollout's ranks hold; `sent_adapters` has a digest for each."""
        self.actor.engine.expect_slices(tuple(slicings))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def sent_adapters(self) -> tuple[list[str], int]:
        """Return the digests of the adapter that was last sent, one for each part in the rollout, and its bytes."""
        return list(self.actor.engine.sent_adapters), self.actor.engine.sent_bytes

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def memory_peak(self) -> dict[str, int]:
        """Return this process's peak memory in bytes: `resident`, and `device` if it computes on a device."""
        return memory_peak()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def cannot_carry_noise(self, order: dict) -> str:
        """Return in one line why this actor's norms cannot have the noise of `order`, or "" if they can."""
        if (noise := self.actor.engine.noise) is None:
            return "its norms were not prepared for noise"
        try:
            noise.describe(NoiseSpec.from_dict(order))
        except AqnError as error:
            return str(error)
        return ""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def apply_noise(self, order: dict) -> dict:
        """Give this actor's forward the rollout's noise from now on, and return the same evidence as the rollout."""
        return self.actor.engine.noise.apply(NoiseSpec.from_dict(order))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def restore_clean(self) -> dict:
        """Remove the noise, and return evidence with the number of forwards that had it (`uses`)."""
        noise = self.actor.engine.noise
        return {"uses": noise.uses(), **noise.restore()}
