"""Nothing stays behind: no process, however deep and stubborn, and no shared memory of the dead."""

import mmap
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from verl_aqn import processes
from verl_aqn.supervise import bind_cores


def test_orphans_that_ignore_sigterm_are_ended():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    # A child that starts a deaf grandchild in a session of its own and dies: the grandchild becomes an orphan.
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
    program = (
        "import subprocess, sys, time; from verl_aqn import processes\n"
        "processes.GRACE_S = 1\n"
        "processes.adopt_orphans()\n"
        f"subprocess.run([sys.executable, '-c', {launcher!r}])\n"
        "time.sleep(1)\n"
        "import psutil\n"
        "left = psutil.Process().children(recursive=True); assert left\n"
        "processes.end_descendants()\n"
        "print('LEFT', [p.pid for p in left if p.is_running()], psutil.Process().children(recursive=True))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "LEFT [] []" in result.stdout, result.stdout + result.stderr


def test_shared_memory_of_the_dead_is_removed_and_that_of_the_living_is_not():
    started = time.time()
    living = shared_memory.SharedMemory(create=True, size=64)
    code = (
        "import os; from multiprocessing import resource_tracker, shared_memory as s;"
        "m = s.SharedMemory(create=True, size=64); print(m.name, flush=True);"
        "resource_tracker.unregister('/' + m.name, 'shared_memory'); os._exit(1)"
    )
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
    try:
        assert os.path.exists(f"/dev/shm/{dead}")
        processes.remove_shared_memory(time.time() + 60)
        assert os.path.exists(f"/dev/shm/{dead}"), "it is older than the run: not ours to remove"
        processes.remove_shared_memory(started - 1)
        assert not os.path.exists(f"/dev/shm/{dead}")
        assert os.path.exists(f"/dev/shm/{living.name}")
    finally:
        living.close()
        living.unlink()


def test_a_semaphore_that_another_run_is_about_to_hand_to_its_child_stays():
    """Its maker has it mapped under a name that is gone: the C library links it to its own name afterwards."""
    lock = multiprocessing.get_context("spawn").Lock()
    name = f"/dev/shm/sem.{lock._semlock.name.removeprefix('/')}"
    assert os.path.exists(name)
    processes.remove_shared_memory(time.time() - 60)
    assert os.path.exists(name)


def test_channels_between_the_ranks_of_a_dead_engine_are_removed():
    """vLLM's tensor-parallel ranks on a CPU leave them behind however they end."""
    started, name = time.time(), f"/dev/shm/vllm_dist_{os.getpid()}-tp:0-[0-1]-cpushm_"
    for rank in (0, 1):
        with open(f"{name}{rank}", "wb") as file:
            file.write(bytes(64))
    try:
        with open(f"{name}1", "rb") as file, mmap.mmap(file.fileno(), 64, access=mmap.ACCESS_READ):
            processes.remove_shared_memory(started - 1)
            assert [os.path.exists(f"{name}{rank}") for rank in (0, 1)] == [False, True]
        processes.remove_shared_memory(started - 1)
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
