"""The training process.

`python -m verl_aqn.launch.driver RUN_FOLDER`. `verl_aqn.launch.supervise` starts and watches it.
"""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from ray._private import ray_constants

from verl_aqn.cluster.process_environment import launched
from verl_aqn.environment import leave
from verl_aqn.errors import AqnError, EvidenceError, ProcessFault
from verl_aqn.integrations.verl.root_cause import root_cause
from verl_aqn.launch.forkserver import worker
from verl_aqn.launch.forkserver.server import PYTHON
from verl_aqn.runs.faults import describe, watch
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stacks import listen


@ray.remote(num_cpus=1)
class AqnTaskRunner:
    """verl's task runner, with `AqnTrainer` instead of verl's trainer."""

    def run(self, config: DictConfig) -> None:
        """Train from the first step, or the last checkpoint, to the last step."""
        import transfer_queue
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import validate_config

        from verl_aqn.cluster.worker_setup import TEMPORARY
        from verl_aqn.integrations.verl.cluster_nodes import check_nodes
        from verl_aqn.integrations.verl.keyed import AqnAgentLoopManager
        from verl_aqn.integrations.verl.rewarding import use_telling_manager
        from verl_aqn.integrations.verl.trainer import AqnTrainer
        from verl_aqn.integrations.verl.verl_plugin import assert_loaded
        from verl_aqn.runs.phases import ENDING, TRACKERS

        assert_loaded("task runner")
        if TEMPORARY in os.environ:
            check_nodes(config)
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        config.transfer_queue.enable = True
        use_telling_manager(config)
        OmegaConf.resolve(config)
        transfer_queue.init(config.transfer_queue)
        try:
            trainer = AqnTrainer(config)
            trainer.event("loading the actor")
            trainer.init()
            agents = AqnAgentLoopManager.create(
                config=config,
                llm_client=trainer.get_llm_client(),
                teacher_client=trainer.get_teacher_client(),
                reward_loop_worker_handles=trainer.get_reward_handles(),
            )
            trainer.fit(agents)
            trainer.doing(TRACKERS)
            trainer.logger.finish()
            trainer.doing(ENDING)
        finally:
            transfer_queue.close()


def use_own_worker() -> None:
    """Let the Ray that this process starts run our program for each worker (`verl_aqn.launch.forkserver.worker`)."""
    # Ray joins this name to its own folder; an absolute path stays as it is.
    ray_constants.SETUP_WORKER_FILENAME = str(Path(worker.__file__).resolve())


def start(config: DictConfig, records: RunFolder) -> None:
    """Start training with verl's `run_ppo`, on a new Ray or on the cluster at RAY_ADDRESS."""
    from verl_aqn.integrations.verl.verl_plugin import assert_loaded

    assert_loaded("driver")
    # Import only now, because verl chooses its platform during this import.
    from verl.trainer.main_ppo import run_ppo

    if os.environ.get("RAY_ADDRESS"):
        from verl_aqn.integrations.verl.cluster_nodes import join

        join(config, records)
    run_ppo(config, task_runner_class=AqnTaskRunner)
    if os.environ.get("RAY_ADDRESS"):
        from verl_aqn.integrations.verl.cluster_nodes import settle

        settle(records)


def main(folder: Path) -> int:
    """Run the resolved config of a run folder. Return exit code 0 if the run finished, otherwise 1."""
    records = RunFolder(folder)
    listen()
    watch()
    try:
        config = launched(records)
        cluster = os.environ.get("RAY_ADDRESS")
        text = f"joining the Ray cluster at {cluster}" if cluster else "starting Ray"
        records.append("events.jsonl", {"kind": "phase", "text": text, "time": time.time()})
        if python := os.environ.get(PYTHON):
            # The same as verl's `run_ppo`, but without importing verl here, so that Ray starts earlier.
            settings: Any = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
            settings["runtime_env"]["py_executable"] = python
            use_own_worker()
            ray.init(**settings)
            runner: Any = AqnTaskRunner
            ray.get(runner.remote().run.remote(config))
        else:
            start(config, records)
    except Exception as error:
        traceback.print_exc()
        cause = root_cause(error)
        text = str(cause) if isinstance(cause, AqnError) else f"{type(cause).__name__}: {cause}"
        line = (text.strip().splitlines() or ["no message"])[0][:500]
        # `supervise` looks for the cause of this error among the errors of all processes.
        fault = describe(error) | ({"text": line} if isinstance(cause, AqnError) else {})
        # An error that the user must fix would occur again in the next attempt; a failed process may be a chance event.
        if isinstance(cause, EvidenceError):
            records.add_evidence({"kind": "stopped", "reason": line})
        again = not isinstance(cause, AqnError) or isinstance(cause, ProcessFault)
        records.append("events.jsonl", {"kind": "error", "text": line, "again": again, "fault": fault})
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    # Import under the real name, so that Ray pickles the classes by reference and not from __main__.
    from verl_aqn.launch import driver as run

    leave(run.main(Path(sys.argv[1])))
