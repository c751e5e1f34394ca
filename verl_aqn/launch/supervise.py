"""Starting the training process, watching it, and cleaning up all its processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from verl_aqn.cluster.process_environment import MEMORY_S, environment, launched, starts_warm
from verl_aqn.config.schema import parse_aqn
from verl_aqn.environment import cluster_address
from verl_aqn.launch.cause import Fault, death
from verl_aqn.launch.forkserver.server import PYTHON, warm_python
from verl_aqn.launch.watchdog import Watchdog
from verl_aqn.launch.witness import Witness
from verl_aqn.runs import faults, stacks, temporary
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.processes import SharedMemory, adopt_orphans, end_descendants, start_module
from verl_aqn.runs.tail import Tail

POLL_S = 0.5
MEMORY_S = 5  # between checks of shared memory
RAY = {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
CLEAN_S = 60  # less than the time that a cluster's job has to stop (cluster/node.py)


@dataclass
class Outcome:
    """How the training process ended: `finished`, `failed` or `interrupted`.

    `again`: it failed by a fault that another attempt may avoid (a process died or hung), not by a wrong request.
    `signal`: the number of the signal that interrupted it.
    """

    status: str
    message: str = ""
    again: bool = False
    signal: int = 0


class Listener(Protocol):
    """Receiver of new records while the process runs."""

    def record(self, name: str, record: dict) -> None: ...


def environment(run: RunFolder, temporary: str) -> dict[str, str]:
    """Return the environment of the training process. All processes of a Ray that it starts inherit it."""
    env = worker_environment(run, temporary)
    env.pop("RAY_ADDRESS", None)
    if (address := cluster_address(launched(run))) is None:
        return env | local_ray(temporary)
    # The run may override the environment that its job was submitted with.
    return env | RAY | {"RAY_ADDRESS": address, "RAY_TMPDIR": temporary, "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}


def local_ray(temporary: str) -> dict[str, str]:
    """Return the environment variables for a process that starts its own Ray."""
    return RAY | {
        "RAY_TMPDIR": temporary,
        # With 0, Ray uses this machine only: it binds to loopback, and verl's servers take their address from Ray.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A separate token for this run. Ray would put one token into the home folder, which other users can read.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_prestart_worker_first_driver": "0",  # it would have an environment that no task of a run uses
        "RAY_worker_register_timeout_seconds": "600",  # the first one waits until its parent has finished its imports
    }


def worker_environment(run: RunFolder, temporary: str) -> dict[str, str]:
    """Return the environment variables for every worker of the run, on any machine."""
    config = launched(run)
    ranks = int(config.actor_rollout_ref.rollout.tensor_model_parallel_size)
    env = engine_environment(temporary, cpu=config.aqn.profile == "cpu", ranks=ranks)
    env["HYDRA_FULL_ERROR"] = "1"
    env[stacks.FOLDER] = str(stacks.folder_in(temporary))
    env[faults.PLACE] = str(run.path / faults.FILE)
    stay_here(env, run.path, run.state["attempt"])
    return env


def starts_warm(config: DictConfig) -> bool:
    """Return whether the processes of a run that starts its own Ray are forked: on CPUs.

    They are not if verl's `run_ppo` would do more than start Ray: determinism (which needs its own hash seed, while a
    forked process has its parent's), the insight logger, a timeline at the end. A Python interpreter that the user
    chose also excludes forking.
    """
    deterministic = config.actor_rollout_ref.rollout.full_determinism
    timeline = config.ray_kwargs.get("timeline_json_file")
    python = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.py_executable")
    other = deterministic or timeline or python or "rl_insight" in config.trainer.logger
    return config.aqn.profile == "cpu" and not other


def launched(run: RunFolder) -> DictConfig:
    """Return the config of the newest attempt."""
    config = OmegaConf.load(run.path / "launch.yaml")
    assert isinstance(config, DictConfig)
    return config


def engine_environment(temporary: str, *, cpu: bool, ranks: int) -> dict[str, str]:
    """Return the environment of a process with vLLM in it.

    Sockets and temporary files go to `temporary`, and usage statistics are off. `cpu`: the process runs on this
    machine's cores, which the `ranks` of an engine share.
    """
    compiled = cache_dir() / "torchinductor"
    own_folder(compiled, "VERL_AQN_CACHE=DIR", make=False, or_roots=True)  # files in this folder are loaded as code
    cores = sorted(os.sched_getaffinity(0))
    env = dict(os.environ) | {"PYTHONUTF8": "1"}
    drop_empty(env)
    keep_off_home(env)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # ten processes import verl; compiled files save 6 s in each
    count = threads()
    env.setdefault("OMP_NUM_THREADS", str(count))
    env.update(
        TMPDIR=temporary,
        VLLM_RPC_BASE_PATH=temporary,
        TORCHINDUCTOR_CACHE_DIR=str(compiled),
        TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS="0",  # these headers would go to TMPDIR and cost 10 s in each run
        TOKENIZERS_PARALLELISM="false",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="false",  # by HTTP, which verl opens to everybody but does not use itself
        DO_NOT_TRACK="1",
    )
    if cpu:
        env["VERL_PLATFORM"] = "cpu"
        env.pop("CUDA_VISIBLE_DEVICES", None)  # Ray refuses a simulated GPU together with an empty list
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # If this process has only a part of the time of many cores, do not bind: other processes may use any core.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", bind_cores(cores, ranks) if count == len(cores) else "nobind")
    return env


def bind_cores(cores: list[int], ranks: int) -> str:
    """Return the cores of each tensor-parallel rank of an engine in vLLM's format ("0,1|2,3").

    Actor and rollout take turns, so an engine uses all cores in its phase and divides them among its ranks. If there
    are more ranks than cores, ranks share cores.
    """
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def supervise(run: RunFolder, listener: Listener) -> Outcome:
    """Run `verl_aqn.launch.driver` on the run folder until it ends.

    Its output and that of Ray, verl and vLLM go to training.log. Ctrl-C and SIGTERM stop it cleanly. All its descendant
    processes are ended by process id before this function returns.
    """
    adopt_orphans()
    clean_after_killed(run)
    address, started = cluster_address(launched(run)), time.time()
    stop: list[int] = []
    previous = {
        sig: signal.signal(sig, lambda number, _frame: stop.append(number)) for sig in (signal.SIGINT, signal.SIGTERM)
    }
    folder, lock = temporary.make(run.path)
    memory, looked, promises = SharedMemory(Path(folder)), started, stacks.folder_in(folder)
    try:
        run.append("events.jsonl", {"kind": "temporary", "path": folder, "since": started})
        tails = {name: Tail(run.path / name) for name in ("events.jsonl", "metrics.jsonl", faults.FILE)}
        promises.mkdir()
        watchdog = Watchdog(parse_aqn(launched(run)).run.patience, promises, alone=address is None)
        witness = Witness(Path(folder), watchdog)
        env = environment(run, folder)
        if address is None and starts_warm(launched(run)):
            python, server = warm_python(folder)
            env[PYTHON] = str(python)
            # The server runs no part of the run itself, so it does not report stacks or errors.
            start_module("verl_aqn.zygote.server", [server], {**env, stacks.FOLDER: "", faults.PLACE: ""}, run.log)
        process = start_module("verl_aqn.verl_api.run", [run.path], env, run.log)
        error: dict = {}
        while process.poll() is None and not stop:
            said = _drain(tails, listener, watchdog, witness)
            if said and not error:
                watchdog.look()  # before the other processes go, because the run ends
            error = said or error
            if not error and (ended := witness.must_end()):
                return _failed(witness, ended)
            if fault := watchdog.fault():
                kept = run.path / f"stacks-{run.state['attempt']}.txt"
                kept.write_text(on_nodes("stacks", run, [folder], address) or stacks.collect(promises, watchdog.vital))
                if error:
                    break
                return _failed(witness, _unsaid(fault), f"every process's stack: {kept}")
            if text := watchdog.warning():
                run.append("events.jsonl", {"kind": "warning", "text": text})
            if time.time() - looked > MEMORY_S:
                memory.look()
                looked = time.time()
            time.sleep(POLL_S)
        if stop:
            by = "Ctrl-C" if stop[0] == signal.SIGINT else "SIGTERM"
            return Outcome("interrupted", f"stopped by {by}", signal=stop[0])
        error = _drain(tails, listener, watchdog, witness) or error
        if process.returncode == 0:
            return Outcome("finished")
        if error:
            return _failed(witness, Fault.of(error["fault"]))
        if process.returncode is not None and process.returncode < 0:
            return _failed(witness, death(time.time(), "verl_aqn.verl_api.run", process.pid, process.returncode))
        return _failed(witness, _unsaid(f"the training process ended with exit code {process.returncode}"))
    finally:
        memory.look()
        end_descendants()
        with suppress(OSError), run.log.open("a") as log:
            log.write(stacks.crashes(promises))
        memory.remove(started)
        os.close(lock)  # otherwise this node would not be cleaned
        on_nodes("clean", run, [folder], address)
        for sig, handler in previous.items():
            signal.signal(sig, handler)
        temporary.remove(Path(folder), run.path)


def _unsaid(text: str) -> Fault:
    """Return the fault of a run that did not report an error itself."""
    return Fault(time.time(), "", 0, "ProcessFault", text, ours=True)


def _failed(witness: Witness, last: Fault, more: str = "") -> Outcome:
    """Return the outcome of a run that ended by `last`. `more`: where to look if no other cause is known."""
    cause = witness.cause(last)
    text = witness.told(cause)
    return Outcome("failed", f"{text} ({more})" if more and cause == last else text, again=cause.by_chance)


def clean_after_killed(run: RunFolder) -> None:
    """Remove what earlier attempts of this run left behind because they were killed (kill -9, a power cut)."""
    left = [record for record in run.read("events.jsonl") if record["kind"] == "temporary"]
    left = [record for record in left if Path(record["path"]).exists()]
    for record in left:
        memory = SharedMemory(Path(record["path"]))
        if temporary.remove(Path(record["path"]), run.path):
            memory.remove(record["since"] if "since" in record else record["started"])  # older records use this key
    if left and (run.path / "launch.yaml").exists():  # before launch.yaml exists, nothing ran on a cluster
        on_nodes("clean", run, [record["path"] for record in left], cluster_address(launched(run)))


def on_nodes(task: str, run: RunFolder, temporaries: list[str], address: str | None) -> str:
    """Return what `verl_api.nodes` prints for a task on all nodes; "" without a cluster, or if the task times out."""
    if temporaries and address:
        env = dict(os.environ) | {"RAY_ADDRESS": address}
        command = [sys.executable, "-m", "verl_aqn.integrations.verl.cluster_nodes", task, str(run.path), *temporaries]
        with suppress(subprocess.TimeoutExpired):
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CLEAN_S, check=False, env=env
            ).stdout
    return ""


def _drain(tails: dict[str, Tail], *listeners: Listener) -> dict:
    """Pass new records to the listeners and return the last error among them."""
    error: dict = {}
    for name, tail in tails.items():
        for record in tail.new():
            if record.get("kind") == "error":
                error = record
            for listener in listeners:
                listener.record(name, record)
    return error
