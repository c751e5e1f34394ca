"""A Python that starts warm: it has the server (`verl_aqn.launch.forkserver.server`) run its arguments, and ends as that does.

`python -I -S client.py SOCKET ARGUMENTS…` imports as little as it can. It stands for the process to whoever started
it: signals go on to the real one, the exit status comes back. Where no server answers, or the arguments are none that
gain by it, it becomes an ordinary Python.
"""

import array
import json
import os
import re
import signal
import socket
import struct
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SPAWNED = r"-c from multiprocessing\.spawn import spawn_main; spawn_main\(((?:(?:, )?\w+=\d+)*)\)"


def gains(arguments: list[str]) -> bool:
    """Whether this is a worker of Ray's, or a process that vLLM spawns."""
    return arguments[0].endswith("/default_worker.py") or re.fullmatch(SPAWNED, " ".join(arguments[:2])) is not None


def forked(server: socket.socket, path: str, arguments: list[str]) -> int | None:
    """Id of the process that runs the arguments; None where no server answers."""
    try:
        server.connect(path)
        return ask(server, arguments)
    except OSError:
        return None


def ask(server: socket.socket, arguments: list[str]) -> int:
    """Send arguments, environment, working directory and open files; → id of the process that has them now."""
    files = [int(name) for name in os.listdir("/proc/self/fd") if int(name) != server.fileno()]
    files = [file for file in files if _is_open(file)]  # but for the one that listed them
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd(), "files": files}
    data = json.dumps(request).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    server.sendmsg([struct.pack("!I", len(data))], rights)
    server.sendall(data)
    return receive(server)


def receive(server: socket.socket) -> int:
    """A number that the server sends.

    Raises:
        ConnectionError: it died.
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
    """→ exit status."""
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
