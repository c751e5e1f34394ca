"""The process that forks the other processes of a run on CPUs, with verl, torch and vLLM already imported.

A run starts eight processes one after another, and each would spend ten seconds on the same imports. Forked processes
also share those memory pages. This is not for accelerators: their runtimes do not work in a process that was forked
after they were asked for devices.
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
import tempfile
import time
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.spawn import spawn_main
from pathlib import Path
from typing import Any

from verl_aqn.environment import leave
from verl_aqn.launch.forkserver.client import SPAWNED
from verl_aqn.runs import faults, stacks
from verl_aqn.runs.processes import end_with_parent, ended_children

PYTHON = "VERL_AQN_PYTHON"  # environment variable: path of this run's replacement for `python`
ENDS = "ends.jsonl"  # in the run's temporary folder: one line for each forked process that has ended
# These do not import Ray, which reads its node and job from the environment at import.
FIRST = (
    "torch._dynamo",
    "tensordict",
    "torch.distributed.fsdp",
    "transformers.modeling_utils",
    "peft",
    "datasets",
    "vllm",
    "vllm.model_executor.models.llama",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.worker.cpu_worker",
    "vllm.tool_parsers",
    "fastapi",
    "math_verify",
)
# These import Ray, so they wait for the first request.
THEN = (
    "ray",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.entrypoints.openai.api_server",
    "transfer_queue",
    "verl_aqn.integrations.verl.trainer",
    "verl_aqn.integrations.verl.workers",
    "verl_aqn.integrations.verl.rollout",
)


@dataclass
class Request:
    """What a client asks to run, as `python ARGUMENTS…`."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    files: dict[int, int]  # file number in the client → file number here
    question: bool = False  # to a server without a run: run the arguments, `-m MODULE …`, and tell how that ended


def warm_python(temporary: str) -> tuple[Path, Path]:
    """Write the replacement for `python` into the folder `temporary`. Return its path and the server's socket."""
    python, server = Path(temporary) / "python", Path(temporary) / "zygote"
    client = [sys.executable, "-I", "-S", str(Path(__file__).with_name("client.py")), str(server)]
    python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    python.chmod(0o700)
    return python, server


def preload(names: Iterable[str]) -> None:
    """Import those of the modules that are installed."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@contextlib.contextmanager
def unused_generator() -> Iterator[None]:
    """Keep Ray's C++ generator of ids unused, and so unseeded: otherwise all children would produce the same ids.

    At import, its only use is one id for each actor class.
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
    """Let vLLM's processes set their titles by Ray's function: setproctitle's own does not work after a fork."""
    import ray
    import setproctitle

    module: Any = setproctitle
    module.setproctitle = ray._raylet.setproctitle


def preload_in(environment: dict[str, str]) -> None:
    """Import the remaining modules with the environment of Ray's first worker."""
    os.environ.update({**environment, stacks.FOLDER: "", faults.PLACE: ""})
    with unused_generator():
        preload(THEN)
    share_titles()
    gc.collect()
    gc.freeze()  # garbage collection would write to pages that the children share


def receive(client: socket.socket) -> Request:
    """Receive a request that `client.ask` sent.

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
    numbers = dict(zip(told["files"], files, strict=True))
    return Request(told["arguments"], told["environment"], told["folder"], numbers, told.get("question", False))


class Zygote:
    """A server that forks a process for each client and tells the client how its process ended."""

    def __init__(self, listener: socket.socket, ends: Path) -> None:
        self.listener = listener
        self.ends = ends  # file with one line for each child
        self.clients: dict[socket.socket, int] = {}  # → process
        self.woken, self.wake = socket.socketpair()  # by SIGCHLD
        self.wake.setblocking(False)

    def serve(self) -> Request:
        """Serve for as long as this process lives. In each child, return the request that the child has to run."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self.wake.fileno())
        while True:
            ready, _, _ = select.select([self.listener, self.woken, *self.clients], [], [])
            if self.woken in ready:
                self.woken.recv(4096)
                self.tell_ends()
            for client in self.clients.keys() & set(
                ready
            ):  # a client sends nothing after its request, so it was killed
                os.kill(self.clients.pop(client), signal.SIGKILL)
                client.close()
            if self.listener in ready and (request := self.accept()):
                return request

    def prepare(self, environment: dict[str, str]) -> None:
        """Import what the first request brings the environment for."""
        if "ray" not in sys.modules:
            preload_in(environment)

    def accept(self) -> Request | None:
        """Fork for the next client. Return its request in the child, None in the parent."""
        client, _ = self.listener.accept()
        try:
            request = receive(client)
        except OSError:
            client.close()
            return None
        self.prepare(request.environment)
        process = os.fork()
        if process == 0:
            # If a Ray worker dies, the raylet ends its process group, so each child gets its own group.
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
        """Tell the client of each child that has ended the exit code, negative for a signal."""
        for process, status in ended_children():
            with contextlib.suppress(OSError), self.ends.open("a") as file:
                file.write(json.dumps({"pid": process, "status": status, "time": time.time()}) + "\n")
            for client in [client for client, its in self.clients.items() if its == process]:
                del self.clients[client]
                with client:
                    _send(client, status)


def _send(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the client was killed
        client.sendall(struct.pack("!i", number))


def take_over(request: Request) -> None:
    """Take the files, the environment and the folder of the request."""
    import numpy as np

    # The client's files get their original numbers. They move above these first, so that none overwrites another.
    high = max(request.files, default=0) + 1
    moved = {number: fcntl.fcntl(here, fcntl.F_DUPFD, high) for number, here in request.files.items()}
    for here in request.files.values():
        os.close(here)
    for number, here in moved.items():
        os.dup2(here, number)
        os.close(here)

    os.environ.clear()
    os.environ.update(request.environment)
    tempfile.tempdir = None  # read TMPDIR again
    os.chdir(request.folder)
    np.random.seed()  # otherwise all children draw the same numbers; `random` reseeds itself after a fork


def become(request: Request) -> None:
    """Turn this process into what `python ARGUMENTS…` would be, except for modules already imported, and run it."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    from verl_aqn.integrations.verl.root_cause import note_task_errors

    take_over(request)
    os.environ.update(
        get_ppo_ray_runtime_env()["env_vars"]
    )  # verl's settings for Ray workers; it leaves out variables that are set
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
    """Listen at once, so that clients wait while modules are being imported."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        preload(FIRST)
        request = serve_at(listener, path)
    become(request)


def main_ahead(link: int) -> None:
    """Import first, and then answer questions until the socket `link` tells of the run to serve.

    `verl_aqn.launch.forkserver.ahead` is at the other end.
    """
    with socket.socket(fileno=link) as parent:
        preload(FIRST)
        try:
            parent.sendall(b"!")  # the imports have finished
            while (told := receive(parent)).question:
                sys.stdout.flush()  # what the imports printed is no part of an answer
                process = os.fork()
                if process == 0:
                    break
                for number in told.files.values():
                    os.close(number)
                _send(parent, process)
                _send(parent, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        except OSError:  # there is no run: its recipe was rejected
            return
    if told.question:
        answer(told)
        return
    listener, log = (told.files[number] for number in (0, 1))
    os.write(log, os.pread(1, os.fstat(1).st_size, 0))  # what the imports printed
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    os.environ.clear()
    os.environ.update(told.environment)
    tempfile.tempdir = None  # read TMPDIR again: each run has its own
    with socket.socket(fileno=listener) as listening:
        request = serve_at(listening, told.arguments[0])
    become(request)


def answer(request: Request) -> None:
    """Run `-m MODULE …` in this forked process, as `python -m MODULE …` would."""
    end_with_parent()
    take_over(request)
    _, module, *arguments = request.arguments
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        leave(end.code)
    leave(0)


def serve_at(listener: socket.socket, path: str) -> Request:
    """Serve clients of the socket at `path`. In each child, return the request that the child has to run."""
    ends = Path(path).with_name(ENDS)
    ends.touch()
    return Zygote(listener, ends).serve()


if __name__ == "__main__":
    if sys.argv[1] == "--ahead":
        main_ahead(int(sys.argv[2]))
    else:
        main(sys.argv[1])
