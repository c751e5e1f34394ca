"""Starting the fork server before a run: it imports its first modules while the recipe is checked and measured."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from omegaconf import DictConfig

from verl_aqn.cluster.process_environment import engine_environment, starts_warm
from verl_aqn.environment import cluster_address
from verl_aqn.runs import faults, stacks
from verl_aqn.runs.processes import end_with_parent
from verl_aqn.safe_files import open_own

WAIT_S = 60  # for imports that take ten seconds


class Ahead:
    """A fork server that has no run yet. `hand_over` gives it one, and `close` ends a server without a run."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._link, theirs = socket.socketpair()
        # Its output before it has a run. The server copies it to the run's log then.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "verl_aqn.launch.forkserver.server", "--ahead", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        self.given = False

    def wait(self) -> None:
        """Wait until the server's imports have finished, so that they take no core from a computation.

        Return anyway if the server dies or takes longer than `WAIT_S`.
        """
        self._link.settimeout(WAIT_S)
        with contextlib.suppress(OSError):
            self._link.recv(1, socket.MSG_PEEK)

    def hand_over(self, path: Path, environment: Mapping[str, str], log: Path) -> bool:
        """Let the server serve a run at the socket `path`. Return False if it has died or already serves one.

        Clients may connect at once; they wait until the imports have finished.
        """
        if self.given or self.process.poll() is not None:
            return False
        data = json.dumps({"arguments": [str(path)], "environment": dict(environment), "folder": os.getcwd(),
                           "files": [0, 1]}).encode()  # fmt: skip
        with (
            socket.socket(socket.AF_UNIX) as listener,
            open(open_own(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as output,
        ):
            listener.bind(str(path))
            listener.listen(64)
            try:
                socket.send_fds(self._link, [struct.pack("!I", len(data))], [listener.fileno(), output.fileno()])
                self._link.settimeout(WAIT_S)
                self._link.sendall(data)
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
    """Start a server ahead of a run of `config`, where the run's processes are forked; otherwise yield None."""
    if cluster_address(config) is not None or not starts_warm(config):
        yield None
        return
    ranks = int(config.actor_rollout_ref.rollout.tensor_model_parallel_size)
    environment = engine_environment(tempfile.gettempdir(), cpu=True, ranks=ranks)
    # The server runs no part of the run itself, so it does not report stacks or errors.
    with Ahead({**environment, stacks.FOLDER: "", faults.PLACE: ""}) as ahead:
        yield ahead
