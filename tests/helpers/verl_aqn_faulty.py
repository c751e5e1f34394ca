"""Errors and deaths in chosen functions of a run's processes. Every Python process of the run imports this module.

So it imports little. `sabotage(folder, *plan)` returns the environment of a run with faults. The keys of a fault are
`at` (a key of PLACES), `attempt` of the run, `how` ("raise" or the name of a signal), `text` of the error, `calls`
(number of successful calls in one process before the fault) and `times` (number of failures after that).
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import signal
import sys
from pathlib import Path

PLAN = "VERL_AQN_TEST_FAULTS"
VERL, VLLM = "verl.experimental", "vllm.v1"
PLACES = {
    "reward worker, start": (f"{VERL}.reward_loop.reward_loop", "RewardLoopWorker.__init__"),
    "reward worker, reward": (f"{VERL}.reward_loop.reward_loop", "RewardLoopWorker.compute_score"),
    "agent loop, start": (f"{VERL}.agent_loop.agent_loop", "AgentLoopWorker.__init__"),
    "agent loop, generation": (f"{VERL}.agent_loop.agent_loop", "AgentLoopWorker._run_agent_loop"),
    "rollout server, start": ("verl_aqn.integrations.verl.rollout", "AqnHttpServer.run_server"),
    "rollout server, generation": ("verl_aqn.integrations.verl.rollout", "AqnHttpServer.generate"),
    "request router, start": ("verl.workers.rollout.router", "GlobalRequestLoadBalancer.__init__"),
    "request router, generation": ("verl.workers.rollout.router", "GlobalRequestLoadBalancer.acquire_server"),
    "rollout engine, start": (f"{VLLM}.engine.core", "EngineCoreProc.__init__"),
    "rollout engine, generation": (f"{VLLM}.engine.core", "EngineCore.step"),
    "rollout worker, start": (f"{VLLM}.worker.worker_base", "WorkerWrapperBase.init_device"),
    "rollout worker, generation": (f"{VLLM}.worker.cpu_worker", "CPUWorker.execute_model"),
    "rollout worker, sync": (
        "verl_aqn.integrations.verl.worker_extension",
        "AqnWorkerExtension.update_weights_from_ipc",
    ),
    "storage's controller, start": ("transfer_queue.controller", "TransferQueueController.__init__"),
    "storage's controller, generation": ("transfer_queue.controller", "TransferQueueController.kv_retrieve_meta"),
    "storage, generation": ("transfer_queue.storage.simple_storage", "StorageUnitData.put_data"),
    "actor, start": ("verl.workers.engine_workers", "ActorRolloutRefWorker.init_model"),
    "critic, start": ("verl_aqn.integrations.verl.critic", "AqnValueEngine._build_module"),
    "critic, values": ("verl_aqn.integrations.verl.critic", "ValueHead.forward"),
    "actor, sync": ("verl.workers.engine_workers", "ActorRolloutRefWorker.update_weights"),
}


def sabotage(folder: Path, *plan: dict) -> dict[str, str]:
    """Return the environment of a run with these faults; `folder` stores the needed files."""
    (folder / "sitecustomize.py").write_text("import tests.helpers.verl_aqn_faulty as f; f.install()\n")
    (folder / "plan.json").write_text(json.dumps(plan))
    root = Path(__file__).resolve().parents[2]
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(root)]), PLAN: str(folder / "plan.json")}


def install() -> None:
    """Change the functions of the plan as soon as their modules are imported."""
    if PLAN in os.environ:
        sys.meta_path.insert(0, Finder(json.loads(Path(os.environ[PLAN]).read_text())))


class Finder(importlib.abc.MetaPathFinder):
    """An import finder that changes the modules of the plan when they are executed."""

    def __init__(self, plan: list[dict]) -> None:
        self.plan = plan

    def find_spec(self, name, path, target=None):
        faults = [fault for fault in self.plan if PLACES[fault["at"]][0] == name]
        if not faults or (spec := importlib.machinery.PathFinder.find_spec(name, path)) is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module):
            run(module)
            for fault in faults:
                change(module, PLACES[fault["at"]][1], fault)

        spec.loader.exec_module = run_and_change
        return spec


def attempt() -> int:
    """Return the attempt number of the run that this process belongs to; 0 outside a run."""
    place = os.environ.get("VERL_AQN_ERRORS")
    return json.loads((Path(place).parent / "state.json").read_text())["attempt"] if place else 0


def change(module, name: str, fault: dict) -> None:
    """Make a function of `module` fail as the fault says."""
    *parts, last = name.split(".")
    owner = functools.reduce(getattr, parts, module)
    if hasattr(owner, "__ray_metadata__"):  # `ray.remote` has made a class that calls the methods of this moment
        owner = owner.__ray_metadata__.modified_class
    real = getattr(owner, last)
    calls = {}

    def fail_if_due() -> None:
        if attempt() != fault["attempt"]:
            return
        calls[os.getpid()] = calls.get(os.getpid(), 0) + 1  # each child of a zygote counts separately
        first = fault.get("calls", 0)
        if first < calls[os.getpid()] <= first + fault.get("times", 1 << 30):
            if fault["how"] != "raise":
                os.kill(os.getpid(), signal.Signals[fault["how"]])
            raise ValueError(fault["text"])

    @functools.wraps(real)
    def faulty(*args, **named):
        fail_if_due()
        return real(*args, **named)

    @functools.wraps(real)
    async def faulty_later(*args, **named):
        fail_if_due()
        return await real(*args, **named)

    setattr(owner, last, faulty_later if inspect.iscoroutinefunction(real) else faulty)
