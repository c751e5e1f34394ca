"""The command line in forks of a process that has its imports, so that a run of a test need not repeat them.

A command takes five seconds to import torch and transformers, and its fork server nine for vLLM. Here a process of
pytest imports all of it once, and each command is a fork of it that does what `python -m verl_aqn.cli` does. The
command's fork server is a fork of the command, before it does anything. Whatever else a run starts, it starts itself.

Tests of how a command starts, and those whose environment an import may read, start a new Python instead (`Warm.fits`).
"""

import atexit
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

from tests.helpers.leftovers import MARK
from verl_aqn.cluster.process_environment import allocator, engine_environment
from verl_aqn.launch.forkserver import ahead, client, server
from verl_aqn.runs.processes import end_with_parent

# Variables that no import reads. cv2 and torch set the last two in pytest when something imports them.
NOT_READ = {
    MARK,
    "VERL_AQN_CACHE",
    "TMPDIR",
    "PYTEST_CURRENT_TEST",
    "LD_LIBRARY_PATH",
    "TORCHINDUCTOR_CACHE_DIR",
}
COMMAND = (
    "verl_aqn.cli.main",
    "verl_aqn.launch.sweep",
    "verl_aqn.preflight.probe",
    "verl_aqn.preflight.sizing",
    "verl_aqn.preflight.adapter_folder",
    "pandas",
)


class Command:
    """A command that runs: the part of `subprocess.Popen` that the tests use."""

    def __init__(self, path: Path, arguments: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(str(path))
        outputs = [os.pipe(), os.pipe()]
        theirs = [os.open(os.devnull, os.O_RDONLY), *(write for _, write in outputs)]
        client.send(self._link, [str(one) for one in arguments], environment, dict(enumerate(theirs)))
        for file in theirs:
            os.close(file)
        self.stdout, self.stderr = (os.fdopen(read, encoding="utf-8", errors="replace") for read, _ in outputs)
        self.pid = client.receive(self._link)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._link], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._link.settimeout(timeout)
            try:
                self.returncode = client.receive(self._link)
            except TimeoutError:
                raise subprocess.TimeoutExpired("verl-aqn", timeout or 0) from None
            self._link.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        texts: dict[IO[str], str] = {}

        def read(stream: IO[str]) -> None:
            with stream:
                texts[stream] = stream.read()

        readers = [threading.Thread(target=read, args=[one], daemon=True) for one in (self.stdout, self.stderr)]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts[self.stdout], texts[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Warm:
    """The process that imports. Its socket is in a folder of its own, because pytest's are too deep for a socket."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.path = Path(self._folder.name) / "socket"
        self._early, self._owner = dict(os.environ), os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm", str(self.path)],
            env=allocator() | engine_environment(tempfile.gettempdir(), cpu=True, ranks=1),  # as for a fork server
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # so that the forks do not write to a terminal as if they had one
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Return whether `environment` differs from this pytest's first one in nothing that an import may read."""
        return {*self._early.items()} ^ {*environment.items()} <= {
            (name, said) for name in NOT_READ for said in (self._early.get(name), environment.get(name))
        }

    def start(self, arguments: Sequence[str | Path], environment: Mapping[str, str]) -> Command:
        """Start `verl-aqn ARGUMENTS…`. The first command waits until the imports have finished."""
        while not self.path.exists():
            if self.process.poll() is not None:
                raise ChildProcessError("the process with the imports ended")
            select.select([], [], [], 0.05)
        return Command(self.path, arguments, environment)

    def close(self) -> None:
        """End the process, and with it all its commands, unless a fork of this pytest ends."""
        if os.getpid() == self._owner:
            self.process.terminate()
            self.process.wait()
            self._folder.cleanup()


def run(arguments: Sequence[str | Path], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str] | None:
    """Run `verl-aqn ARGUMENTS…` to its end in a fork, or return None if the environment does not allow it."""
    warm = shared()
    if not warm.fits(environment):
        return None
    command = warm.start(arguments, environment)
    out, err = command.communicate()
    return subprocess.CompletedProcess(list(arguments), command.wait(), out, err)


def shared() -> Warm:
    """Return the process that all tests of this pytest share. It ends with pytest."""
    if _started().process.poll() is not None:  # a test has ended all processes of this pytest
        _started.cache_clear()
    return _started()


@cache
def _started() -> Warm:
    warm = Warm()
    atexit.register(warm.close)
    return warm


class Commands(server.Zygote):
    """A server of commands, which import what Ray reads from their environment only when they need it."""

    def prepare(self, environment: dict[str, str]) -> None:
        pass


class Child:
    """The part of `subprocess.Popen` that `Ahead` uses, for a fork of this process."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        return self._look(0)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _look(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # the run's own clean-up has waited for all children
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def new_streams() -> None:
    """Open the standard streams anew, because the old ones know what their files were in the parent."""
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def reserve() -> int | None:
    """Fork a fork server that waits until the command starts one. Return the socket's number there, and here None."""
    ours, theirs = socket.socketpair()
    process = os.fork()
    if process == 0:
        ours.close()
        os.setsid()
        end_with_parent()
        try:
            request = server.receive(theirs)
        except OSError:  # the command ended without one
            os._exit(0)
        theirs.close()
        link = int(request.arguments[0])
        server.take_over(request)
        new_streams()
        return link
    theirs.close()
    started = ahead.start

    def start(link: socket.socket, output: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen | Child:
        ahead.start = started  # another one is started as usual
        with ours, open(os.devnull) as nothing:
            files = {0: nothing.fileno(), 1: output.fileno(), 2: output.fileno(), 3: link.fileno()}
            client.send(ours, ["3"], environment, files)
        return Child(process)

    ahead.start = start  # type: ignore[assignment]
    return None


def main(path: str) -> None:
    """Import, serve commands, and run one in each child."""
    server.preload((*server.FIRST, *COMMAND))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        request = Commands(listener, Path(path).with_name("ends")).serve()
    link = reserve()
    if link is not None:
        server.main_ahead(link)
        return
    server.take_over(request)
    new_streams()
    sys.argv = ["verl-aqn", *request.arguments]
    runpy.run_module("verl_aqn.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
