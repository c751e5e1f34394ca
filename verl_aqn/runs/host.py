"""How much of this machine a process may use: in a container its control groups say so, and not the kernel."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC, FREE = Path("/proc/self"), 1 << 60  # bytes; version 1 says nearly 2^63 where there is no limit


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    total: int
    available: int


def memory(proc: Path = PROC) -> Memory:
    """Return the least that the kernel and the control groups of this process, and of all above it, leave to it.

    Pages of files that nobody has used for a while (`inactive_file`) are given back before anything is refused, so they
    count as available.
    """
    kernel = psutil.virtual_memory()
    total, available = kernel.total, kernel.available
    for folder in _groups("memory", proc):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is None or used is None or limit >= FREE:
            continue
        total = min(total, int(limit))
        available = min(available, max(0, int(limit - used) + _inactive(folder)))
    return Memory(total, available)


def cores(proc: Path = PROC) -> float:
    """Return how many cores this process may use at once: those it may run on, or its groups' share of time."""
    count = float(len(os.sched_getaffinity(0)))
    for folder in _groups("cpu", proc):
        quota, period = _number(folder, "cpu.cfs_quota_us"), _number(folder, "cpu.cfs_period_us")
        with suppress(OSError, ValueError):
            quota, period = map(float, (folder / "cpu.max").read_text().split())  # "max 100000": no limit
        if quota and period and quota > 0:
            count = min(count, quota / period)
    return count


def threads(proc: Path = PROC) -> int:
    """Return how many threads can compute at once: `cores` as a whole number, at least 1."""
    return max(1, math.ceil(cores(proc)))


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Folders of the process's control group for `controller` and of those above it, as far as they can be seen.

    A container sees its own part alone: then the mount's root is the group that the path begins with, or the path is
    one of the host's that does not exist here.
    """
    mounts = {kind: (root, Path(point)) for kind, root, point in _mounts(controller, proc)}
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        kind = "cgroup2" if not names else "cgroup" if controller in names.split(",") else ""
        if kind not in mounts:
            continue
        root, point = mounts[kind]
        below = path.removeprefix(root) if root != "/" and f"{path}/".startswith(f"{root}/") else path
        folder = point / below.strip("/")
        for one in (folder, *folder.parents):
            if one.is_dir():
                yield one
            if one == point:
                break


def _mounts(controller: str, proc: Path) -> Iterator[tuple[str, str, str]]:
    """(file system, root within it, where it is mounted) of version 2's tree, and of version 1's with `controller`."""
    try:
        lines = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            root, point = (field.replace("\\040", " ") for field in fields.split()[3:5])
            yield kind, root, point


def _number(folder: Path, *names: str) -> float | None:
    """The number in the first of these files that there is; infinite for "max", None where there is none."""
    for name in names:
        with suppress(OSError, ValueError):
            return float((folder / name).read_text().strip().replace("max", "inf"))
    return None


def _inactive(folder: Path) -> int:
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Version 1 has this group's own pages, and under another name those of the groups below it too.
        return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
    return 0
