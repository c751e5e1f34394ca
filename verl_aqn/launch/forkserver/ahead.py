"""Starting the fork server before a run: it imports its first modules while the recipe is checked and measured.

Until there is a run, questions to verl and vLLM run in forks of this server, which have most of their imports.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Self

from omegaconf import DictConfig

from verl_aqn.cluster.process_environment import allocator, engine_environment, starts_warm
from verl_aqn.launch.forkserver import client
from verl_aqn.preflight.asking import asked_by, in_new_process
from verl_aqn.runs import faults, stacks
from verl_aqn.runs.processes import end_with_parent
from verl_aqn.safe_files import open_own

WAIT_S = 60  # for imports that take ten seconds


def start(link: socket.socket, output: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a server without a run, which receives its questions and its run from `link`."""
    return subprocess.Popen(
        [sys.executable, "-m", "verl_aqn.launch.forkserver.server", "--ahead", str(link.fileno())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=[link.fileno()],
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


class Ahead:
    """A fork server that has no run yet. `hand_over` gives it one, and `close` ends a server without a run."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._link, theirs = socket.socketpair()
        # Its output before it has a run. The server copies it to the run's log then.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        with theirs:
            self.process = start(theirs, self._said, environment)
        self.given = False
        self._imported = False

    def wait(self) -> bool:
        """Wait until the server's imports have finished, so that they take no core from a computation.

        Return False if the server has died or takes longer than `WAIT_S`.
        """
        if not self._imported:
            self._link.settimeout(WAIT_S)
            with contextlib.suppress(OSError):
                self._imported = bool(self._link.recv(1))
        return self._imported

    def run_module(
        self, arguments: list[str], text: str, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m MODULE …` in a fork of the server (see `RunsModule`); without a server, in a new process."""
        if self.given or not self.wait():
            return in_new_process(arguments, text, environment, timeout)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(text.encode())
            files[0].seek(0)
            try:
                numbers = {number: file.fileno() for number, file in enumerate(files)}
                client.send(self._link, arguments, environment, numbers, question=True)
                process = client.receive(self._link)
            except OSError:
                self._give_up()
                return in_new_process(arguments, text, environment, timeout)
            self._link.settimeout(timeout)
            try:
                status = client.receive(self._link)
            except TimeoutError:
                os.kill(process, signal.SIGKILL)
                self._link.settimeout(WAIT_S)
                client.receive(self._link)
                raise subprocess.TimeoutExpired(arguments, timeout) from None
            except OSError:  # the server was killed, and its fork with it
                self._give_up()
                status = -signal.SIGKILL
            for file in files:
                file.seek(0)
            said, errors = (file.read().decode(errors="replace") for file in files[1:])
        return subprocess.CompletedProcess(arguments, status, said, errors)

    def _give_up(self) -> None:
        """Use a server no more that has died."""
        self._link.close()
        self._imported = False

    def hand_over(self, path: Path, environment: Mapping[str, str], log: Path) -> bool:
        """Let the server serve a run at the socket `path`. Return False if it has died or already serves one.

        Clients may connect at once; they wait until the imports have finished.
        """
        if self.given or self.process.poll() is not None:
            return False
        with (
            socket.socket(socket.AF_UNIX) as listener,
            open(open_own(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as output,
        ):
            listener.bind(str(path))
            listener.listen(64)
            try:
                self._link.settimeout(WAIT_S)
                client.send(self._link, [str(path)], environment, {0: listener.fileno(), 1: output.fileno()})
            except OSError:
                path.unlink()
                return False
        self.given = True  # the link stays open, because closing it would be an error for the server
        return True

    def close(self) -> None:
        """End the server, unless it serves a run."""
        self._link.close()
        self._said.close()
        if not self.given:
            self.process.terminate()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def ahead_of(config: DictConfig) -> Iterator[Ahead | None]:
    """Start a server ahead of a run of `config`, where the run's processes are forked; otherwise yield None.

    Questions to verl and vLLM are asked in forks of it as long as there is no run.
    """
    if not starts_warm(config):
        yield None
        return
    ranks = int(config.actor_rollout_ref.rollout.tensor_model_parallel_size)
    # The allocator is loaded when a program starts, so all forks of this one have it, or none.
    environment = allocator() | engine_environment(tempfile.gettempdir(), cpu=True, ranks=ranks)
    # The server runs no part of the run itself, so it does not report stacks or errors.
    with Ahead({**environment, stacks.FOLDER: "", faults.PLACE: ""}) as ahead, asked_by(ahead.run_module):
        yield ahead
