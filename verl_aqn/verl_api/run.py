"""The training process: `python -m verl_aqn.verl_api.run RUN_FOLDER`, started and watched by verl_aqn.train."""

import sys
import traceback
from pathlib import Path

import ray
from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import AqnError
from verl_aqn.runs.folder import RunFolder


@ray.remote(num_cpus=1)
class AqnTaskRunner:
    """verl's task runner with our trainer in verl's place."""

    def run(self, config: DictConfig) -> None:
        """Train from the first step, or the last checkpoint, to the last step."""
        import transfer_queue
        from verl.trainer.ppo.v1 import AgentLoopManagerTQ

        from verl_aqn.verl_api.plugin import assert_loaded
        from verl_aqn.verl_api.trainer import AqnTrainer

        assert_loaded("task runner")
        config.transfer_queue.enable = True
        OmegaConf.resolve(config)
        transfer_queue.init(config.transfer_queue)
        try:
            trainer = AqnTrainer(config)
            trainer.event("loading the actor")
            trainer.init()
            agents = AgentLoopManagerTQ.create(
                config=config,
                llm_client=trainer.get_llm_client(),
                teacher_client=trainer.get_teacher_client(),
                reward_loop_worker_handles=trainer.get_reward_handles(),
            )
            trainer.fit(agents)
            trainer.logger.finish()
        finally:
            transfer_queue.close()


def root_cause(error: BaseException) -> BaseException:
    """The first error behind Ray's wrappers."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def main(folder: Path) -> int:
    """Run the resolved config of a run folder. Exit code 0 when it finished, 1 when it did not."""
    records = RunFolder(folder)
    try:
        from verl_aqn.verl_api.plugin import assert_loaded

        assert_loaded("driver")
        # Only now: verl chooses its platform while these are imported.
        from verl.trainer.main_ppo import run_ppo
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import validate_config

        config = OmegaConf.load(folder / "launch.yaml")
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        records.append("events.jsonl", {"kind": "phase", "text": "starting Ray"})
        run_ppo(config, task_runner_class=AqnTaskRunner)
    except Exception as error:
        traceback.print_exc()
        cause = root_cause(error)
        text = str(cause) if isinstance(cause, AqnError) else f"{type(cause).__name__}: {cause}"
        records.append("events.jsonl", {"kind": "error", "text": text.strip().splitlines()[0][:500]})
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    # Import under the real name, so that Ray pickles the classes by reference and not from __main__.
    from verl_aqn.verl_api import run

    sys.exit(run.main(Path(sys.argv[1])))
