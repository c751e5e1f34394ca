"""A command in a fork (`tests/helpers/warm.py`) is what it is in a new Python, or is not forked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import warm


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule", "e12_aggressive_1ep", "profile=cpu", "--json"],
        ["train", "e12", "profile=cpu", "aqn.noise.sigma_strat=1"],
        ["tain"],
        ["--help"],
    ],
)
def test_output_and_code_are_those_of_a_new_python(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "verl_aqn.cli", *arguments]
    new = subprocess.run(command, capture_output=True, text=True, check=False)
    forked = warm.run(arguments, os.environ)
    assert forked, {*os.environ.items()} ^ {*warm.shared()._early.items()}
    assert (forked.returncode, forked.stdout, forked.stderr) == (new.returncode, new.stdout, new.stderr)


def test_a_fork_has_its_own_environment_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = warm.run(
        ["quantize", Path("nothere"), tmp_path / "dst"], {**os.environ, "VERL_AQN_CACHE": str(tmp_path / "cache")}
    )
    assert told
    assert "nothere is not a Hugging Face model folder" in told.stderr


@pytest.mark.parametrize("name", ["HOME", "HF_HOME", "VLLM_LOGGING_LEVEL", "OMP_NUM_THREADS", "PYTHONPATH", "COLUMNS"])
@pytest.mark.parametrize("value", ["other", None])
def test_what_an_import_may_read_asks_for_a_new_python(name, value, monkeypatch):
    with_it = {**os.environ, name: "as it was"}
    one = warm.Warm.__new__(warm.Warm)
    one._early = with_it
    assert one.fits({**with_it, "VERL_AQN_CACHE": "elsewhere"})
    changed = {**with_it, name: value} if value else {key: said for key, said in with_it.items() if key != name}
    assert not one.fits(changed)


def test_it_is_started_again_after_a_test_has_ended_all_processes():
    first = warm.shared()
    first.process.terminate()
    first.process.wait()
    assert warm.shared().process.pid != first.process.pid
    assert json.loads(warm.run(["schedule", "e12_aggressive_1ep", "profile=cpu", "--json"], os.environ).stdout)
