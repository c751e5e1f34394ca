"""Limits of control groups on a machine's memory and cores, read from files as kernels and containers show them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl_aqn.cluster import process_environment
from verl_aqn.runs import host

GB = 10**9


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """`tree(mounts, cgroup, files)` → the /proc/self of a process on a machine of 64 GB (50 free) and 16 cores.

    `mounts`: lines "kind root folder options"; `files`: content by path below `tmp_path`.
    """
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=50 * GB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))

    def make(mounts: list[str], cgroup: list[str], files: dict[str, object]) -> Path:
        proc = tmp_path / "proc"
        proc.mkdir()
        lines = []
        for number, (kind, root, folder, options) in enumerate(line.split() for line in mounts):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            lines.append(
                f"{number} 1 0:{number} {root} {tmp_path / folder} rw,nosuid shared:9 - {kind} {kind} {options}"
            )
        (proc / "mountinfo").write_text("\n".join(lines))
        (proc / "cgroup").write_text("\n".join(cgroup) + "\n")
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{content}\n")
        return proc

    return make


def test_no_control_groups_at_all(tmp_path, tree):
    assert host.memory(tmp_path / "nowhere") == host.Memory(64 * GB, 50 * GB)
    assert host.cores(tmp_path / "nowhere") == 16


def test_a_container_sees_its_own_group_as_the_root(tree):
    """Docker, Kubernetes: version 2 with its own namespace."""
    files = {"c/memory.max": 8 * GB, "c/memory.current": 3 * GB, "c/cpu.max": "250000 100000",
             "c/memory.stat": f"anon 1\ninactive_file {GB}"}  # fmt: skip
    proc = tree(["cgroup2 / c rw"], ["0::/"], files)
    assert host.memory(proc) == host.Memory(8 * GB, 6 * GB)
    assert (host.cores(proc), host.threads(proc)) == (2.5, 3)


def test_no_limit_is_the_machine(tree):
    files = {"c/memory.max": "max", "c/memory.current": 3 * GB, "c/cpu.max": "max 100000"}
    proc = tree(["cgroup2 / c rw"], ["0::/"], files)
    assert host.memory(proc) == host.Memory(64 * GB, 50 * GB)
    assert host.cores(proc) == 16


def test_the_narrowest_of_nested_groups_counts(tree):
    """A job of Slurm or systemd: one limit on the user's slice, another on the job, none on the step."""
    files = {"c/user/memory.max": 20 * GB, "c/user/memory.current": 19 * GB, "c/user/cpu.max": "400000 100000",
             "c/user/job/memory.max": 10 * GB, "c/user/job/memory.current": 2 * GB, "c/user/job/cpu.max": "max 100000",
             "c/user/job/step/memory.max": "max", "c/user/job/step/memory.current": 2 * GB}  # fmt: skip
    proc = tree(["cgroup2 / c rw"], ["0::/user/job/step"], files)
    assert host.memory(proc) == host.Memory(10 * GB, 1 * GB)
    assert host.cores(proc) == 4


def test_version_1_with_a_path_of_the_host(tree):
    """Docker on version 1: the path is the host's, and the mount starts at it."""
    files = {"m/memory.limit_in_bytes": 4 * GB, "m/memory.usage_in_bytes": 3 * GB,
             "m/memory.stat": f"inactive_file 5\ntotal_inactive_file {2 * GB}",
             "p/cpu.cfs_quota_us": 150000, "p/cpu.cfs_period_us": 100000}  # fmt: skip
    mounts = ["cgroup /docker/1f m rw,memory", "cgroup /docker/1f p rw,cpu,cpuacct", "cgroup2 / u rw"]
    proc = tree(mounts, ["4:memory:/docker/1f", "2:cpu,cpuacct:/docker/1f", "0::/"], files)
    assert host.memory(proc) == host.Memory(4 * GB, 3 * GB)
    assert (host.cores(proc), host.threads(proc)) == (1.5, 2)


def test_version_1_without_limits(tree):
    files = {"m/memory.limit_in_bytes": 9223372036854771712, "m/memory.usage_in_bytes": 3 * GB,
             "p/cpu.cfs_quota_us": -1, "p/cpu.cfs_period_us": 100000}  # fmt: skip
    mounts = ["cgroup / m rw,memory", "cgroup / p rw,cpu"]
    proc = tree(mounts, ["4:memory:/not/here", "1:cpu:/"], files)
    assert host.memory(proc) == host.Memory(64 * GB, 50 * GB)
    assert host.cores(proc) == 16


def test_a_process_outside_of_its_name_space_is_no_endless_walk(tree):
    proc = tree(["cgroup2 / c rw"], ["0::/../../other"], {"c/memory.max": 8 * GB, "c/memory.current": 0})
    assert host.memory(proc).total == 8 * GB


def test_engines_have_as_many_threads_as_the_group_has_cores(monkeypatch, tmp_path):
    """They are bound to cores only if the run has all of them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path))
    monkeypatch.setattr(process_environment, "threads", lambda: 4)
    env = process_environment.engine_environment(str(tmp_path), cpu=True, ranks=2)
    assert (env["OMP_NUM_THREADS"], env["VLLM_CPU_OMP_THREADS_BIND"]) == ("4", "0,2|1,3")
    monkeypatch.setattr(process_environment, "threads", lambda: 2)
    env = process_environment.engine_environment(str(tmp_path), cpu=True, ranks=2)
    assert (env["OMP_NUM_THREADS"], env["VLLM_CPU_OMP_THREADS_BIND"]) == ("2", "nobind")
