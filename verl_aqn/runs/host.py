"""Limits of this machine for a process: in a container its control groups set them, not the kernel."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC, FREE = Path("/proc/self"), 1 << 60  # bytes; version 1 reports nearly 2^63 if there is no limit


@dataclass(frozen=True)
class Memory:
    """Memory in bytes."""

    total: int
    available: int


def memory(proc: Path = PROC) -> Memory:
    """Return the smallest limit that the kernel and this process's control groups (and their parents) set.

    Pages of files that were not used recently (`inactive_file`) are freed before an allocation fails, so they count as
    available.
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
    """Return how many cores this process may use at once: its allowed cores, or less if its groups limit CPU time."""
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
    """Yield the folders of the process's control group for `controller` and of its parents, if they are visible.

    A container sees only its own part of the tree: then the mount's root is the beginning of the group's path, or the
    path belongs to the host and does not exist in the container.
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
    """Yield (file system, root within it, mount point) of version 2's tree, and of version 1's with `controller`."""
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
    """Return the number in the first of these files that exists, infinity for "max", or None if there is none."""
    for name in names:
        with suppress(OSError, ValueError):
            return float((folder / name).read_text().strip().replace("max", "inf"))
    return None


def _inactive(folder: Path) -> int:
    with suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # In version 1 this has only the group's own pages; the total with its child groups has another name.
        return int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
    return 0
