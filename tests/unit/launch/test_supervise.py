"""Child processes are always cleaned up, however deep and stubborn, and so is the shared memory of dead ones."""

import mmap
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from verl_aqn.cluster.process_environment import bind_cores
from verl_aqn.runs.processes import SharedMemory, memory_of_children


def test_orphans_that_ignore_sigterm_are_ended():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    # The child starts a grandchild that ignores signals, in its own session, and dies: the grandchild is an orphan.
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
    program = (
        "import subprocess, sys, time; from verl_aqn.runs import processes\n"
        "processes.GRACE_S = 4\n"
        "processes.adopt_orphans()\n"
        f"subprocess.run([sys.executable, '-c', {launcher!r}])\n"
        "time.sleep(1)\n"
        "import psutil\n"
        "left = psutil.Process().children(recursive=True); assert left\n"
        "began = time.monotonic()\n"
        "processes.end_descendants()\n"
        "assert 4 < time.monotonic() - began < 8, 'one that ignores SIGTERM is waited for once'\n"
        "print('LEFT', [p.pid for p in left if p.is_running()], psutil.Process().children(recursive=True))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "LEFT [] []" in result.stdout, result.stdout + result.stderr


def test_memory_of_children_is_that_of_all_descendants():
    """The fork server is part of the estimate: a machine is not refused because it has started already."""
    code = "x = bytearray(b'1' * 10**8); print('up', flush=True); import time; time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    before = memory_of_children()
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout
        process.stdout.readline()
        assert memory_of_children() - before == pytest.approx(1.1e8, rel=0.25)
        os.killpg(process.pid, 9)


MAKE = (
    "import sys; from multiprocessing import resource_tracker, shared_memory as s;"
    "m = s.SharedMemory(create=True, size=64); print(m.name, flush=True);"
    "resource_tracker.unregister('/' + m.name, 'shared_memory'); sys.stdin.read(1); import os; os._exit(1)"
)


@contextmanager
def a_process_with_shared_memory():
    """Return a process and its files in /dev/shm; it is killed without cleaning up."""
    process = subprocess.Popen([sys.executable, "-c", MAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path = Path("/dev/shm") / process.stdout.readline().strip()
    try:
        yield process, path
    finally:
        process.kill()
        process.communicate()
        path.unlink(missing_ok=True)


def test_shared_memory_of_the_dead_is_removed_and_that_of_the_living_is_not(tmp_path):
    started, memory = time.time(), SharedMemory(tmp_path)
    with a_process_with_shared_memory() as (living, theirs), a_process_with_shared_memory() as (dead, left):
        memory.look()
        memory.remove(started - 1)
        assert left.exists(), "its process lives"
        dead.communicate("x")
        memory.remove(time.time() + 60)
        assert left.exists(), "it is older than the run: not ours to remove"
        memory.remove(started - 1)
        assert not left.exists()
        assert theirs.exists()
        living.communicate("x")
        SharedMemory(tmp_path).remove(started - 1)  # another process removes what this one has seen
        assert not theirs.exists()


def test_shared_memory_that_no_process_of_the_run_had_mapped_stays(tmp_path):
    """It may belong to a container that shares /dev/shm, whose processes cannot be seen from here."""
    started, memory = time.time(), SharedMemory(tmp_path)
    with a_process_with_shared_memory() as (other, theirs):
        memory.look([psutil.Process()])
        other.communicate("x")
        memory.remove(started - 1)
        assert theirs.exists()


def test_a_semaphore_is_known_by_what_its_maker_has_mapped(tmp_path):
    """The C library maps it under a temporary name and links it to its own name afterwards."""
    started, memory = time.time(), SharedMemory(tmp_path)
    code = (
        "import multiprocessing as m, sys, os; lock = m.get_context('spawn').Lock();"
        "print(lock._semlock.name, flush=True); sys.stdin.read(1); os._exit(1)"
    )
    maker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    path = Path(f"/dev/shm/sem.{maker.stdout.readline().strip().removeprefix('/')}")
    try:
        memory.look()
        memory.remove(started - 1)
        assert path.exists()
    finally:
        maker.kill()
        maker.communicate()
    memory.remove(started - 1)
    assert not path.exists()


def test_channels_between_the_ranks_of_a_dead_engine_are_removed(tmp_path):
    """vLLM's tensor-parallel ranks on a CPU leave them behind however they end."""
    started, memory = time.time(), SharedMemory(tmp_path)
    name = f"/dev/shm/vllm_dist_{os.getpid()}-tp:0-[0-1]-cpushm_"
    for rank in (0, 1):
        with open(f"{name}{rank}", "wb") as file:
            file.write(bytes(64))
    try:
        with open(f"{name}1", "rb") as file, mmap.mmap(file.fileno(), 64, access=mmap.ACCESS_READ):
            with open(f"{name}0", "rb") as file, mmap.mmap(file.fileno(), 64, access=mmap.ACCESS_READ):
                memory.look()
            memory.remove(started - 1)
            assert [os.path.exists(f"{name}{rank}") for rank in (0, 1)] == [False, True]
        memory.remove(started - 1)
        assert not os.path.exists(f"{name}1")
    finally:
        for rank in (0, 1):
            Path(f"{name}{rank}").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("cores", "ranks", "bound"),
    [([0, 1], 1, "0,1"), ([0, 1], 2, "0|1"), ([2, 3, 6, 7], 2, "2,6|3,7"), ([4], 2, "4|4")],
)
def test_ranks_of_an_engine_share_out_the_cores(cores, ranks, bound):
    assert bind_cores(cores, ranks) == bound
