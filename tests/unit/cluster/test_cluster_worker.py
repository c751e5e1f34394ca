"""The first action of each worker of a run on a cluster: create the run's temporary folder for this user only."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from verl_aqn.runs import temporary
from verl_aqn.runs.folder import open_run

SET_UP = """
import mmap, os, time
from pathlib import Path
from verl_aqn.cluster import worker_setup as worker
worker.MEMORY_S = 0.1
worker.set_up_worker()
with open(f"/dev/shm/psm_aqn-test-{os.getpid()}", "w+b") as file:
    file.write(bytes(64))
    file.flush()
    mapped = mmap.mmap(file.fileno(), 64)
    seen, inode = Path(os.environ["VERL_AQN_TEMPORARY"]) / "shared-memory", os.fstat(file.fileno()).st_ino
os.unlink(file.name)
deadline = time.monotonic() + 60
while time.monotonic() < deadline and not (seen.exists() and f" {inode}\\n" in seen.read_text()):
    time.sleep(0.1)
print("seen", f" {inode}\\n" in seen.read_text(), "umask", oct(os.umask(0)))
"""


@pytest.fixture
def start(tmp_path):
    """`start(folder)`: start a worker of a run with this temporary folder; → the run's folder and the result."""
    run = open_run(tmp_path / "base", {})

    def start(folder: Path) -> tuple[Path, subprocess.CompletedProcess]:
        env = {**os.environ, "VERL_AQN_RUN": str(run.path), "VERL_AQN_TEMPORARY": str(folder)}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", f"import os\nos.umask(0)\n{SET_UP}"],
            env=env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return run.path, done

    return start


def test_a_worker_makes_the_folder_and_notes_the_shared_memory_that_it_maps(start):
    folder = temporary.ROOT / f"{temporary.PREFIX}test-{os.getpid()}"
    run, done = start(folder)
    try:
        assert done.stdout == "seen True umask 0o22\n", done.stderr
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert not temporary.remove(folder, run.parent / "other")
    finally:
        assert temporary.remove(folder, run)
    assert not folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_worker_stops_where_another_user_made_the_folder_first(start, tmp_path):
    (folder := tmp_path / "aqn-known").mkdir()
    os.chown(folder, 23456, 23456)
    _, done = start(folder)
    assert done.returncode == 1
    assert f"{folder} was created by another user" in done.stderr
    assert not list(folder.iterdir())
