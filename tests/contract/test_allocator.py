"""The allocator in Ray's package: there, loaded, and keeping what is freed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from verl_aqn.cluster import process_environment
from verl_aqn.cluster.process_environment import allocator

TAKES_AGAIN = """
import resource, torch
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(25 << 20)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, "libjemalloc" in open("/proc/self/maps").read())
"""


def take(env: dict[str, str]) -> tuple[int, str, str]:
    """Return the page faults of the last of eight blocks of 100 MB, whether jemalloc was loaded, and what was said."""
    told = subprocess.run(
        [sys.executable, "-c", TAKES_AGAIN], capture_output=True, text=True, check=True, env={**os.environ, **env}
    )
    faults, loaded = told.stdout.split()
    return int(faults), loaded, told.stderr


def test_memory_that_a_process_frees_needs_no_new_pages(monkeypatch):
    """100 MB are 25,600 pages of 4 kB, or 50 large ones. jemalloc says on standard error which options are unknown."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    each_time, loaded, _ = take({})
    assert loaded == "False"
    faults, loaded, said = take(allocator())
    assert loaded == "True"
    assert faults < each_time / 10
    assert "jemalloc" not in said


def test_a_library_that_the_user_preloads_stays(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert allocator() == {}


@pytest.mark.parametrize("name", ["two words", "a:b", "$LIB"])
def test_a_path_that_the_loader_would_read_as_another_is_not_preloaded(name, tmp_path, monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    library = tmp_path / name / "ray/core/libjemalloc.so"
    library.parent.mkdir(parents=True)
    library.touch()
    found = SimpleNamespace(origin=str(library.parents[1] / "__init__.py"))
    monkeypatch.setattr(process_environment.importlib.util, "find_spec", lambda name: found)
    assert allocator() == {}


def test_an_empty_preload_of_the_user_is_none(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "")
    env = allocator() | process_environment.engine_environment("/tmp", cpu=True, ranks=1)
    assert "libjemalloc" in env["LD_PRELOAD"]


def test_larger_pages_than_jemalloc_knows(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert allocator()
    monkeypatch.setattr(process_environment, "PAGE", 2048)
    assert allocator() == {}


@pytest.mark.parametrize(("profile", "loads"), [("cpu", True), ("cuda", False), ("npu", False)])
def test_the_processes_of_a_run_on_cpus_load_it(profile, loads, tmp_path, monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    config = {
        "aqn": {"profile": profile, "run": {"dir": str(tmp_path)}},
        "actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1}},
        "trainer": {"logger": []},
    }
    (tmp_path / "launch.yaml").write_text(json.dumps(config))
    run = SimpleNamespace(path=tmp_path, state={"attempt": 1})
    env = process_environment.worker_environment(run, process_environment.launched(run), str(tmp_path))
    assert ("LD_PRELOAD" in env, "MALLOC_CONF" in env) == (loads, loads)
