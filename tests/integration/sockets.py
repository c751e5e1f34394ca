"""Every socket that listens during a run, and its reply to a client without a token."""

import json
import re
import socket
import subprocess
import time
from collections import Counter
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import psutil

from verl_aqn.runs.processes import title

DOCS = Path(__file__).parents[2] / "docs" / "security.md"
# The greeting with which ZeroMQ begins; a server's own names in the same place what it asks for.
ZMQ_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
QUEUE = ("ray::TransferQueueController", "ray::SimpleStorageUnit")
NAMELESS = 20  # number of checks for which a process may not have set its title yet
HTTP_REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def guards() -> list[tuple[str, str, str]]:
    """Return (kind of socket, pattern of the process title, guard) from the table in docs/security.md, in its order."""
    found = []
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and (kind := re.fullmatch(r"`(unix|tcp6?)`.*", cells[0])):
            found += [(kind[1], pattern, cells[2]) for pattern in re.findall(r"`([^`]+)`", cells[1])]
    return found


def guard_of(kind: str, process: str) -> str | None:
    """Return the table's guard for such a socket; None if the table does not have it."""
    for known, pattern, guard in guards():
        if known == kind and fnmatchcase(process, pattern):
            return guard
    return None


def listening() -> dict[str, tuple[str, str, int]]:
    """Return all listening sockets of this machine by inode: kind, address or path, port."""
    found = {}
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":
                address, port = words[1].split(":")
                found[words[9]] = (kind, address, int(port, 16))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if int(words[3], 16) & 0x10000:  # __SO_ACCEPTCON
            found[words[6]] = ("unix", words[7] if len(words) > 7 else "", 0)
    return found


def answer(process: str, port: int) -> str:
    """Return the reply of a listener on loopback to a client without a token: "CURVE", an HTTP status, or nothing.

    Listeners of gloo are not contacted, because unknown bytes would end the run.
    """
    if process.startswith(("ray::WorkerDict", "VLLM::")):
        return ""
    greeting = ZMQ_GREETING if process in QUEUE else HTTP_REQUEST
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as client:
        client.settimeout(2)
        client.sendall(greeting)
        said = b""
        while len(said) < 32 and (more := client.recv(64)):
            said += more
        if said.startswith(b"HTTP/"):
            return said.split()[1].decode()
        if said.startswith(b"\xff"):
            return said[12:32].rstrip(b"\0").decode()
    return ""


def script_of(process: psutil.Process) -> str:
    """Return the file name of the script that a Python process runs, "" if none; Ray's are monitor.py, dashboard.py."""
    line = process.cmdline()
    scripts = [Path(word).name for word in line[1:3] if word.endswith(".py")]
    return scripts[0] if scripts and Path(line[0]).name.startswith("python") else ""


def watch(process: subprocess.Popen, file: Path) -> None:
    """Watch a run until it ends, and write one JSON line for each of its listening sockets."""
    seen, nameless = set(), Counter()
    with file.open("w") as out:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                known = listening()
                for child in psutil.Process(process.pid).children(recursive=True):
                    for inode in sorted(_inodes(child.pid) & known.keys() - seen):
                        kind, place, port = known[inode]
                        with suppress(psutil.NoSuchProcess):
                            name = script_of(child) or title(child)
                            nameless[inode] += name.startswith("python")
                            if 0 < nameless[inode] < NAMELESS and name.startswith("python"):
                                continue
                            seen.add(inode)
                            said = answer(name, port) if kind != "unix" else ""
                            found = {"kind": kind, "place": place, "process": name, "said": said}
                            out.write(json.dumps(found) + "\n")
            time.sleep(0.5)


def _inodes(pid: int) -> set[str]:
    """Return the inodes of a process's open sockets."""
    found = set()
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(str(file.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found
