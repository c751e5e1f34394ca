"""Check that the integration tests look only for what their own runs made."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers.leftovers import MARK, Leftovers

# Makes a file or a socket, or only names it in its environment, and waits.
HOLD = """
import mmap, os, socket, sys, time
how, path = sys.argv[1:]
if how == "maps":
    with open(path, "wb") as file:
        file.truncate(4096)
    with open(path, "r+b") as file:
        kept = mmap.mmap(file.fileno(), 4096)
elif how == "opens":
    kept = open(path, "w")
elif how == "listens":
    kept = socket.socket(socket.AF_UNIX)
    kept.bind(path)
else:
    os.mkdir(path)
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def places(tmp_path):
    for name in ("shm", "tmp", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "shm" / "from_before").touch()
    return tmp_path


@pytest.fixture
def watched(places, monkeypatch):
    monkeypatch.delenv(MARK, raising=False)
    watched = Leftovers([(places / "shm", "*"), (places / "tmp", "aqn-*")], places / "runs")
    with subprocess.Popen(["sleep", "60"]) as earlier:  # another test's child, which is nothing that a run left
        watched.start()
        yield watched
        watched.stop()
        earlier.kill()


@pytest.fixture
def hold():
    """`hold(how, path, mark)` → the id of a process that uses the path and is no descendant of this pytest."""
    pids = []

    def start(how, path, mark: str | None) -> int:
        env = {name: value for name, value in os.environ.items() if name != MARK} | {"FOLDER": str(path)}
        env |= {MARK: mark} if mark else {}
        detached = 'setsid "$@" & wait -n -t 0 2> /dev/null; exit 0'
        out = subprocess.Popen(
            ["bash", "-c", detached, "bash", sys.executable, "-c", HOLD, how, str(path)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        word, pid = out.stdout.readline().split()
        assert word == "ready"
        out.wait(timeout=30)
        out.stdout.close()
        pids.append(int(pid))
        assert int(pid) not in [child.pid for child in psutil.Process().children(recursive=True)]
        return int(pid)

    yield start
    for pid in pids:
        if psutil.pid_exists(pid):
            end(pid)


def end(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    deadline = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["maps", "opens", "listens", "names"])
def test_what_a_detached_process_of_ours_left_is_found_after_its_end(watched, places, hold, how):
    path = places / "tmp" / "aqn-ours"
    pid = hold(how, path, watched.mark)
    watched.look()
    end(pid)
    assert watched.found() == {str(path)}


@pytest.mark.parametrize("how", ["maps", "opens", "listens", "names"])
def test_another_run_s_paths_are_not_ours_while_it_lives_and_when_it_is_gone(watched, places, hold, how):
    path = places / "shm" / "theirs"
    pid = hold(how, path, "another pytest's mark" if how == "maps" else None)
    assert watched.found() == set()
    end(pid)
    assert path.exists()
    assert watched.found() == set()


def test_a_path_that_is_removed_is_not_left(watched, places, hold):
    pid = hold("opens", places / "shm" / "ours", watched.mark)
    assert watched.found() == {str(places / "shm" / "ours")}
    end(pid)
    (places / "shm" / "ours").unlink()
    assert watched.found() == set()


def test_living_children_of_this_pytest_are_found(watched):
    with subprocess.Popen(["sleep", "60"]) as child:
        assert f"process {child.pid}" in watched.found()
        child.kill()
    assert watched.found() == set()


def test_a_temporary_folder_belongs_to_the_run_that_its_file_names(watched, places):
    for name, run in (("aqn-ours", places / "runs" / "one"), ("aqn-theirs", places / "elsewhere")):
        (places / "tmp" / name).mkdir()
        (places / "tmp" / name / "run").write_text(str(run))
    assert watched.found() == {str(places / "tmp" / "aqn-ours")}


def test_the_thread_looks_by_itself(watched, places, hold):
    path = places / "shm" / "ours"
    pid = hold("opens", path, watched.mark)
    deadline = time.monotonic() + 30
    while path not in watched._ours:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    end(pid)
    assert watched.found() == {str(path)}
