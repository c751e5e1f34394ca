"""A run in difficult surroundings: no home, a locale without UTF-8, empty variables, a locked working directory.

The run is stopped by SIGTERM and by Ctrl-C, each with the exit code that shells expect.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.users import NOBODY, as_a_user
from tests.integration.conftest import TINY, leftovers, lines, lines_of, newest

ROOT = Path(__file__).resolve().parents[2]

HOSTILE = {
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    **dict.fromkeys(("RAY_ADDRESS", "XDG_CACHE_HOME", "HF_HOME", "WANDB_DIR", "VLLM_CPU_KVCACHE_SPACE"), ""),
}  # fmt: skip


@pytest.fixture
def start(tiny_model, warm_cache, tmp_path):
    """`start(**variables)` → the same run, started again. Its folder's name needs UTF-8."""
    for name in ("nobody", "locked"):
        (tmp_path / name).mkdir()
    (tmp_path / "nobody" / "sitecustomize.py").write_text(NOBODY)
    (tmp_path / "locked").chmod(0o555)
    env = {**os.environ, **HOSTILE, "VERL_AQN_CACHE": str(warm_cache), "PYTHONPATH": f"{tmp_path}/nobody:{ROOT}"}
    env.pop("HOME")
    folder = tmp_path / "lauf ü [σ]"
    overrides = [f"actor_rollout_ref.model.path={tiny_model}", f'aqn.run.dir="{folder}"']
    command = [sys.executable, "-m", "verl_aqn.cli", "train", "e12_aggressive_1ep", *TINY, *overrides]

    def start(**variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=tmp_path / "locked", env=env | variables, text=True, encoding="ascii", stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=as_a_user,
        )  # fmt: skip

    start.folder = folder
    return start


def stop(process: subprocess.Popen, folder: Path, number: int, reached) -> str:
    deadline = time.monotonic() + 400
    while not reached(lines_of(folder)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, lines_of(folder)[-3:]
        time.sleep(0.2)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


@pytest.mark.timeout(1200)
def test_a_run_of_a_user_without_a_home(start, warm_cache, tmp_path):
    before, homes = leftovers(), {path for path in (Path.home() / ".ray",) if path.exists()}
    process = start()
    err = stop(process, start.folder, signal.SIGTERM, lambda events: any("starting Ray" in str(e) for e in events))
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "error: stopped by SIGTERM (log: " in err
    assert leftovers() <= before

    process = start(HOME=str(tmp_path / "locked"))  # there is one, but it cannot be written
    err = stop(process, start.folder, signal.SIGINT, lambda events: any(e.get("phase") == "metrics" for e in events))
    assert process.returncode == 128 + signal.SIGINT, err
    assert err.splitlines()[-1].startswith("error: stopped by Ctrl-C (log: ")
    assert "the same command resumes this run" in err
    assert "Traceback" not in err
    run = newest(start.folder)
    doing = [one["phase"] for one in lines(run / "events.jsonl", "doing")]
    assert doing[0] == "base", doing  # this duration is the usual one for the end
    assert doing.index("sync") < doing.index("metrics")
    assert "UnicodeEncodeError" not in (run / "training.log").read_text(encoding="utf-8")
    assert leftovers() <= before
    assert not list((tmp_path / "locked").iterdir())
    assert (Path.home() / ".ray").exists() == bool(homes)
