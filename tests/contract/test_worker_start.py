"""Our replacement for Ray's `setup_worker.py` makes of a worker what Ray's own makes of it, without importing Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private import ray_constants, workers
from ray._private.runtime_env.context import RuntimeEnvContext

from verl_aqn.launch.driver import use_own_worker
from verl_aqn.launch.forkserver import worker

RAYS = Path(workers.__file__).with_name("setup_worker.py")
TELL = """
import json, os, sys
left = ("SHLVL", "_", "PWD", "OLDPWD", "LC_CTYPE")  # of the shell that Ray starts
print(json.dumps([sys.argv, {k: v for k, v in os.environ.items() if k not in left}, "ray" in sys.modules]))
"""


def started(program: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Start a worker whose program tells what it got, as the raylet does."""
    script = folder / "default_worker.py"
    script.write_text(TELL)
    env = {**os.environ, "BEFORE": "b", "COVERED": "old", **variables}
    command = [sys.executable, str(program), str(script), "--node-ip-address=127.0.0.1", "--a=b 'c' $D", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def context(**changes) -> str:
    return f"{worker.CONTEXT}{RuntimeEnvContext(**changes).serialize()}"


def test_a_worker_is_what_ray_makes_of_it(tmp_path):
    python = tmp_path / "its python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    variables = {"OWN": "1", "COVERED": "new", "PATHS": "x:${BEFORE}:${NOTHING_HAS_IT}:$OWN", "EMPTY": ""}
    words = [context(env_vars=variables, py_executable=f"'{python}'"), "--language=PYTHON", "--startup-token=3"]
    rays = started(RAYS, tmp_path, *words)
    words[0] = context(env_vars=variables, py_executable=str(python))
    ours = started(Path(worker.__file__), tmp_path, *words)
    assert (ours.returncode, ours.stderr) == (0, ""), ours.stderr
    told = json.loads(ours.stdout)
    assert told == json.loads(rays.stdout), rays.stderr
    assert told[0][-1] == "--startup-token=3"
    assert told[1]["PATHS"] == "x:b::1"
    assert told[2] is False


@pytest.mark.parametrize(
    "words",
    [
        [context(command_prefix=["echo", "before", "&&"]), "--language=PYTHON"],
        [context(override_worker_entrypoint="other.py"), "--language=PYTHON"],
        [context(py_executable=f"{sys.executable} -I"), "--language=PYTHON"],
        [f'{worker.CONTEXT}{{"env_vars": {{}}, "of_a_later_ray": 1}}', "--language=PYTHON"],
        [context(), "--language=CPP"],
        [context()],
        ["--language=PYTHON"],
    ],
)
def test_what_it_does_not_know_is_left_to_ray(words, tmp_path):
    rays = tmp_path / "ray" / "_private" / "workers" / "setup_worker.py"
    rays.parent.mkdir(parents=True)
    rays.write_text("import sys; print('by Ray', len(sys.argv))")
    (tmp_path / "ray" / "__init__.py").touch()
    done = started(Path(worker.__file__), tmp_path, *words, PYTHONPATH=str(tmp_path))
    assert done.stdout == f"by Ray {4 + len(words)}\n", done.stderr


def test_its_context_has_the_parts_of_ray_s():
    assert set(json.loads(RuntimeEnvContext().serialize())) == worker.KNOWN


def test_ray_runs_it_for_the_workers_of_a_run(monkeypatch):
    from ray._private.node import Node

    monkeypatch.setattr(ray_constants, "SETUP_WORKER_FILENAME", ray_constants.SETUP_WORKER_FILENAME)
    assert RAYS.name == ray_constants.SETUP_WORKER_FILENAME
    use_own_worker()
    code = Node.__init__.__code__
    assert "SETUP_WORKER_FILENAME" in code.co_names
    assert Path("/anywhere", ray_constants.SETUP_WORKER_FILENAME) == Path(worker.__file__).resolve()
