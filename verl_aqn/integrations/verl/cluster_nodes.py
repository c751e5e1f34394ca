"""Set-up and clean-up of the nodes for a run on an existing Ray cluster.

On one machine every process of a run inherits its environment from `verl_aqn.launch.supervise`. On a cluster the
processes are children of `ray start`, so they get their environment from `verl_aqn.cluster.worker_setup`. `python -m
verl_aqn.integrations.verl.cluster_nodes clean RUN TEMPORARY …` cleans all nodes after a run, and `stacks RUN TEMPORARY`
prints the stack traces of its processes on each node.
"""

import importlib.util
import os
import platform
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import ray
from omegaconf import DictConfig, OmegaConf

from verl_aqn import __version__
from verl_aqn.cluster.nodes import on_every_node
from verl_aqn.cluster.shared_disk import LIMIT, limit, slower, wait_until
from verl_aqn.cluster.worker_setup import LAUNCH, RUN, TEMPORARY, launch_mark, set_up_worker, take_environment
from verl_aqn.errors import EnvironmentFault
from verl_aqn.integrations.verl.verl_plugin import check_versions
from verl_aqn.preflight.run_data import data_files
from verl_aqn.runs.folder import RunFolder, folder_of
from verl_aqn.runs.processes import GRACE_S, SharedMemory, title
from verl_aqn.runs.stacks import collect, folder_in, listening
from verl_aqn.runs.temporary import remove

# Settings for starting a new cluster; Ray rejects some of them together with an address.
_OF_A_NEW_CLUSTER = ("num_cpus", "num_gpus", "resources", "object_store_memory", "include_dashboard", "dashboard_port")


def join(config: DictConfig, folder: RunFolder) -> None:
    """Change `config.ray_kwargs.ray_init` so that the run becomes a job on the cluster at RAY_ADDRESS."""
    settings = config.ray_kwargs.ray_init
    for key in _OF_A_NEW_CLUSTER:
        settings.pop(key, None)
    ours = {
        RUN: str(folder.path),
        TEMPORARY: os.environ["TMPDIR"],
        LAUNCH: launch_mark(folder) or "",
        LIMIT: f"{limit():g}",
    }
    hook = f"{set_up_worker.__module__}.{set_up_worker.__name__}"
    OmegaConf.update(settings, "runtime_env.env_vars", ours, force_add=True)
    OmegaConf.update(settings, "runtime_env.worker_process_setup_hook", hook, force_add=True)


def check_nodes(config: DictConfig) -> None:
    """Check that every node sees the run's files and has the same code; each node is recorded in the evidence.

    Raises:
        EnvironmentFault: a node does not; the message names the node and the fix.
    """
    folder, check = folder_of(config), secrets.token_hex(8)
    needed = [folder.path / "lock", Path(config.actor_rollout_ref.model.path) / "config.json"]
    needed += data_files(config)
    reward = str(config.reward.custom_reward_function.path or "")
    module = reward.removeprefix("pkg://") if reward.startswith("pkg://") else ""
    if reward and not module:
        needed.append(Path(reward).expanduser())
    if not take_environment(folder):
        raise _not_seen(ray.util.get_node_ip_address(), folder.path / "launch.yaml")
    nodes = on_every_node(_describe_node, folder, needed, module, check)
    if len({(node["verl_aqn"], *node["versions"].values()) for node in nodes}) > 1:
        told = "; ".join(f"{n['address']}: verl-aqn {n['verl_aqn']}, {n['versions']}" for n in nodes)
        raise EnvironmentFault(f"the nodes have different versions: run scripts/setup.sh on each of them ({told})")
    # Each node wrote into the folder that it sees. A node with another folder of the same name is missing here.
    notes = {node["address"]: _note(folder, check, node["address"]) for node in nodes}
    wait_until(lambda: all(note.exists() for note in notes.values()))
    if other := [address for address, note in notes.items() if not note.exists()]:
        raise EnvironmentFault(
            f"{folder.path} on node {', '.join(sorted(other))} is another folder: set aqn.run.dir to one on a disk "
            f"that all nodes share; {slower()}"
        )
    for note in notes.values():
        with suppress(FileNotFoundError):
            note.unlink()
    # One process writes all of them, because not every disk has locks between nodes.
    alone = [node["address"] for node in nodes if not node.pop("locked")]
    folder.add_evidence(*({"kind": "node", "check": check, **node} for node in nodes))
    if alone:
        text = f"the disk of {folder.path} has no locks between nodes (seen from {', '.join(sorted(alone))})"
        fix = "start runs in this folder from one node only, or mount the disk with flock"
        folder.append("events.jsonl", {"kind": "warning", "text": f"{text}: {fix}"})


def _note(folder: RunFolder, check: str, address: str) -> Path:
    return folder.path / f".node-{check}-{address}"


def _not_seen(address: str, path: Path) -> EnvironmentFault:
    what = "still sees an earlier attempt's" if path.exists() else "has no"
    return EnvironmentFault(
        f"node {address} {what} {path}: put aqn.run.dir, VERL_AQN_CACHE, model and data on a disk that all nodes "
        f"share; {slower()}"
    )


def _describe_node(folder: RunFolder, needed: list[Path], module: str, check: str) -> dict:
    address, began = ray.util.get_node_ip_address(), time.monotonic()
    if not take_environment(folder):
        raise _not_seen(address, folder.path / "launch.yaml")
    if not wait_until(lambda: all(path.exists() for path in needed), began):
        raise _not_seen(address, next(path for path in needed if not path.exists()))
    if module and not _importable(module):
        raise EnvironmentFault(f"node {address} has no module {module} (the reward function's): install it there")
    (Path(os.environ[TEMPORARY]) / "since").write_text(str(time.time()))  # in this node's time
    _note(folder, check, address).touch()
    node = {"address": address, "host": platform.node(), "verl_aqn": __version__, "versions": check_versions()}
    return {**node, "locked": folder.locked}


def settle(folder: RunFolder) -> None:
    """Wait until this node sees all records that the other nodes wrote, because it judges them next.

    Raises:
        EnvironmentFault: it does not see all of them.
    """
    written = on_every_node(_sizes, folder)
    wanted = {name: max(sizes.get(name, 0) for sizes in written) for sizes in written for name in sizes}

    def seen() -> bool:
        here = _sizes(folder)
        return all(here.get(name, 0) >= size for name, size in wanted.items())

    if not wait_until(seen):
        raise EnvironmentFault(
            f"the training ended, but this node does not see all records of {folder.path} that other nodes wrote: "
            f"{slower()}, and start the run again"
        )


def _sizes(folder: RunFolder) -> dict[str, int]:
    """Return the sizes of the records in bytes. Opening a file makes a network disk ask for its newest size."""
    sizes = {}
    for path in folder.path.glob("*.jsonl"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            sizes[path.name] = file.seek(0, os.SEEK_END)
    return sizes


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing too
        return False


# ---------------------------------------------------------------- after a run


def _clean_node(run: str, temporaries: list[str]) -> None:
    processes = [process for process in psutil.process_iter() if _temporary_of(process) in temporaries]
    memories = {temporary: SharedMemory(Path(temporary)) for temporary in temporaries}
    for temporary, memory in memories.items():
        memory.look(process for process in processes if _temporary_of(process) == temporary)
    for process in processes:
        process.terminate()
    for process in psutil.wait_procs(processes, timeout=GRACE_S)[1]:
        process.kill()
    for temporary, memory in memories.items():
        since = Path(temporary) / "since"
        began = float(since.read_text()) if since.exists() else None
        memory.look([])
        if remove(Path(temporary), Path(run)) and began is not None:
            memory.remove(began)


def _temporary_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(TEMPORARY)
    except psutil.Error:  # the process has ended, or belongs to another user
        return None


def _stacks_of_node(temporary: str) -> str:
    folder = folder_in(temporary)
    living = {pid: title(psutil.Process(pid)) for pid in listening(folder) if psutil.pid_exists(pid)}
    return f"==== node {ray.util.get_node_ip_address()}\n{collect(folder, living)}"


def main(task: str, run: str, *temporaries: str) -> None:
    """Run a task on every node, for runs with these temporary folders.

    `clean` stops the processes that the runs left behind and removes their files; `stacks` prints the stack traces of
    the processes that use the first folder.
    """
    ray.init(log_to_driver=False)
    if task == "clean":
        on_every_node(_clean_node, run, list(temporaries))
    else:
        print(*on_every_node(_stacks_of_node, temporaries[0]), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
