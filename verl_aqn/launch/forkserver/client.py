"""A Python that starts fast: the server (`verl_aqn.launch.forkserver.server`) runs its arguments in a forked process.

`python -I -S client.py SOCKET ARGUMENTS…` imports as little as possible. It stands for the real process: it forwards
signals to it and returns its exit status. If no server answers, or if forking gains nothing for the arguments, it
becomes an ordinary Python.
"""

import array
import json
import os
import re
import signal
import socket
import struct
import sys
from collections.abc import Mapping

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SPAWNED = r"-c from multiprocessing\.spawn import spawn_main; spawn_main\(((?:(?:, )?\w+=\d+)*)\)"


def gains(arguments: list[str]) -> bool:
    """Return whether the arguments are those of a Ray worker or of a process that vLLM spawns."""
    return arguments[0].endswith("/default_worker.py") or re.fullmatch(SPAWNED, " ".join(arguments[:2])) is not None


def forked(server: socket.socket, path: str, arguments: list[str]) -> int | None:
    """Return the id of the process that runs the arguments; None if no server answers."""
    try:
        server.connect(path)
        return ask(server, arguments)
    except OSError:
        return None


def ask(server: socket.socket, arguments: list[str]) -> int:
    """Send arguments, environment, working directory and open files. Return the id of the process that has them now."""
    files = [int(name) for name in os.listdir("/proc/self/fd") if int(name) != server.fileno()]
    files = [file for file in files if _is_open(file)]  # without the one that listed the folder
    send(server, arguments, os.environ, {file: file for file in files})
    return receive(server)


def send(
    server: socket.socket, arguments: list[str], environment: Mapping[str, str], files: dict[int, int], **more: bool
) -> None:
    """Send a request (`verl_aqn.launch.forkserver.server.Request`). `files`: number there → open file here."""
    told = {"arguments": arguments, "environment": dict(environment), "folder": os.getcwd(), "files": list(files)}
    data = json.dumps({**told, **more}).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files.values()))]
    server.sendmsg([struct.pack("!I", len(data))], rights)
    server.sendall(data)


def receive(server: socket.socket) -> int:
    """Receive one number from the server.

    Raises:
        ConnectionError: the server died.
    """
    data = server.recv(4)
    if len(data) != 4:
        raise ConnectionError("the zygote died")
    return struct.unpack("!i", data)[0]


def _is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


def main(path: str, arguments: list[str]) -> int:
    """Run the arguments in a forked process or in an ordinary Python. Return the exit status."""
    server = socket.socket(socket.AF_UNIX)
    process = forked(server, path, arguments) if gains(arguments) else None
    if process is None:
        server.close()
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in FORWARDED:
        signal.signal(number, lambda number, _frame: os.kill(process, number))
    try:
        status = receive(server)
    except ConnectionError:
        return 1
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
