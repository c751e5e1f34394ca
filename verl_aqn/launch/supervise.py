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
from verl_aqn.launch.forkserver.ahead import Ahead
from verl_aqn.launch.forkserver.server import PYTHON, warm_python
from verl_aqn.launch.watchdog import Watchdog
from verl_aqn.launch.witness import Witness
from verl_aqn.runs import faults, stacks, temporary
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.processes import SharedMemory, adopt_orphans, end_descendants, start_module
from verl_aqn.runs.tail import Tail

POLL_S = 0.5
CLEAN_S = 60  # less than the time that a cluster's job has to stop (cluster/start.py)


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


def supervise(run: RunFolder, listener: Listener, ahead: Ahead | None = None) -> Outcome:
    """Run `verl_aqn.launch.driver` on the run folder until it ends.

    Its output and that of Ray, verl and vLLM go to training.log. Ctrl-C and SIGTERM stop it cleanly. All its descendant
    processes are ended by process id before this function returns. `ahead`: a fork server that was started before.
    """
    adopt_orphans()
    clean_after_killed(run)
    config, started = launched(run), time.time()
    address = cluster_address(config)
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
        watchdog = Watchdog(parse_aqn(config).run.hang_timeout_factor, promises, alone=address is None)
        witness = Witness(Path(folder), watchdog)
        env = environment(run, config, folder)
        if starts_warm(config):
            python, server = warm_python(folder)
            env[PYTHON] = str(python)
            # The server runs no part of the run itself, so it does not report stacks or errors.
            silent = {**env, stacks.FOLDER: "", faults.PLACE: ""}
            if ahead is None or not ahead.hand_over(server, silent, run.log):
                start_module("verl_aqn.launch.forkserver.server", [server], silent, run.log)
        process = start_module("verl_aqn.launch.driver", [run.path], env, run.log)
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
            return _failed(witness, death(time.time(), "verl_aqn.launch.driver", process.pid, process.returncode))
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
    """Return what `cluster_nodes` prints for a task on all nodes; "" without a cluster, or if the task times out."""
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
