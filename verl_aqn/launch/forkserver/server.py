"""The process from which the others of a run on CPUs are forked, with verl, torch and vLLM already imported.

A run has eight processes one after the other that would import the same for ten seconds each. Forked, they share those
pages too. Not for accelerators: their runtimes cannot be used in a process forked after they were asked for devices.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import re
import runpy
import select
import shlex
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.spawn import spawn_main
from pathlib import Path
from typing import Any

from verl_aqn.launch.forkserver.client import SPAWNED
from verl_aqn.runs import faults, stacks
from verl_aqn.runs.processes import ended_children

PYTHON = "VERL_AQN_PYTHON"  # environment variable: the warm Python of this run
ENDS = "ends.jsonl"  # in the run's temporary folder: a line for each forked process that has ended
FIRST = (  # does not import Ray
    "torch._dynamo",
    "tensordict",
    "torch.distributed.fsdp",
    "transformers.modeling_utils",
    "peft",
    "datasets",
    "vllm",
)
# Ray reads raylet and job from the environment when it is imported, so this waits for the first request.
THEN = (
    "ray",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.entrypoints.openai.api_server",
    "math_verify",
    "transfer_queue",
    "verl_aqn.integrations.verl.trainer",
    "verl_aqn.integrations.verl.workers",
    "verl_aqn.integrations.verl.rollout",
)


@dataclass
class Request:
    """What a client asks to be run, as `python ARGUMENTS…`."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    files: dict[int, int]  # number in the client → number here


def warm_python(temporary: str) -> tuple[Path, Path]:
    """Write what is called in place of `python` into the folder `temporary`; → it, and where the server listens."""
    python, server = Path(temporary) / "python", Path(temporary) / "zygote"
    client = [sys.executable, "-I", "-S", str(Path(__file__).with_name("client.py")), str(server)]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    python.chmod(0o700)
    return python, server


def preload(names: Iterable[str]) -> None:
    """Import what there is of it."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@contextlib.contextmanager
def unused_generator() -> Iterator[None]:
    """Ray's C++ generator of ids stays unused, and so unseeded: else every child would go on with the same ids.

    At import the only use of it is an id for each actor class.
    """
    import ray.actor

    real = ray.actor.ActorClassID
    module: Any = ray.actor
    module.ActorClassID = types.SimpleNamespace(from_random=lambda: real(os.urandom(real.size())))
    try:
        yield
    finally:
        module.ActorClassID = real


def share_titles() -> None:
    """vLLM's processes title themselves by Ray's function: that of the package finds its place no more after a fork."""
    import ray
    import setproctitle

    module: Any = setproctitle
    module.setproctitle = ray._raylet.setproctitle


def preload_in(environment: dict[str, str]) -> None:
    """Import the rest, with what a first worker of Ray's was given for its environment."""
    os.environ.update({**environment, stacks.FOLDER: "", faults.PLACE: ""})
    with unused_generator():
        preload(THEN)
    share_titles()
    gc.collect()
    gc.freeze()  # the collector would write to pages that the children share


def receive(client: socket.socket) -> Request:
    """A request as `client.ask` sends it.

    Raises:
        ConnectionError: the client died.
    """
    header, files, _, _ = socket.recv_fds(client, 4, 253)
    if len(header) != 4:
        raise ConnectionError
    (size,) = struct.unpack("!I", header)
    data = bytearray()
    while len(data) < size:
        part = client.recv(size - len(data))
        if not part:
            raise ConnectionError
        data += part
    told = json.loads(data)
    return Request(told["arguments"], told["environment"], told["folder"], dict(zip(told["files"], files, strict=True)))


class Zygote:
    """Forks for every client, and tells it how its process ended."""

    def __init__(self, listener: socket.socket, ends: Path) -> None:
        self.listener = listener
        self.ends = ends  # a file, a line for each child
        self.clients: dict[socket.socket, int] = {}  # → process
        self.woken, self.wake = socket.socketpair()  # by SIGCHLD
        self.wake.setblocking(False)

    def serve(self) -> Request:
        """For as long as this process lives. Returns in each child, with what it is to run."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self.wake.fileno())
        while True:
            ready, _, _ = select.select([self.listener, self.woken, *self.clients], [], [])
            if self.woken in ready:
                self.woken.recv(4096)
                self.tell_ends()
            for client in self.clients.keys() & set(ready):  # it says nothing more: it was killed
                os.kill(self.clients.pop(client), signal.SIGKILL)
                client.close()
            if self.listener in ready and (request := self.accept()):
                return request

    def accept(self) -> Request | None:
        """Fork for the next client. → its request, in the child alone."""
        client, _ = self.listener.accept()
        try:
            request = receive(client)
        except OSError:
            client.close()
            return None
        if "ray" not in sys.modules:
            preload_in(request.environment)
        process = os.fork()
        if process == 0:
            # Where a worker of Ray's has died, the raylet ends its process group. That must not be everybody's.
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for one in (self.listener, self.woken, self.wake, client, *self.clients):
                one.close()
            return request
        for number in request.files.values():
            os.close(number)
        self.clients[client] = process
        _send(client, process)
        return None

    def tell_ends(self) -> None:
        """Every child that has ended: tell its client the exit code, negative for a signal."""
        for process, status in ended_children():
            with contextlib.suppress(OSError), self.ends.open("a") as file:
                file.write(json.dumps({"pid": process, "status": status, "time": time.time()}) + "\n")
            for client in [client for client, its in self.clients.items() if its == process]:
                del self.clients[client]
                with client:
                    _send(client, status)


def _send(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it was killed
        client.sendall(struct.pack("!i", number))


def become(request: Request) -> None:
    """Make this process what `python` with these arguments would be, but for what is imported already, and run it."""
    import numpy as np
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    from verl_aqn.integrations.verl.root_cause import note_task_errors

    # The client's files take their own numbers; first out of the way of those, lest one covers another.
    high = max(request.files, default=0) + 1
    moved = {number: fcntl.fcntl(here, fcntl.F_DUPFD, high) for number, here in request.files.items()}
    for here in request.files.values():
        os.close(here)
    for number, here in moved.items():
        os.dup2(here, number)
        os.close(here)

    os.environ.clear()
    os.environ.update(request.environment)
    os.environ.update(get_ppo_ray_runtime_env()["env_vars"])  # but for what is set
    os.chdir(request.folder)
    np.random.seed()  # else the same in all of them; `random` sees to itself
    stacks.listen()
    faults.watch()
    note_task_errors()
    multiprocessing.set_executable(os.environ[PYTHON])

    arguments = request.arguments
    if (spawned := re.fullmatch(SPAWNED, " ".join(arguments[:2]))) is not None:
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        spawn_main(**{name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", spawned[1])})
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")


def main(path: str) -> None:
    """Listen at once, so that clients wait for what is being imported."""
    ends = Path(path).with_name(ENDS)
    ends.touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        preload(FIRST)
        request = Zygote(listener, ends).serve()
    become(request)


if __name__ == "__main__":
    main(sys.argv[1])
