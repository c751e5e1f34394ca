"""What another node wrote is waited for: a slow disk is not taken for one that is not shared."""

import os
import threading
import time

import pytest

from verl_aqn.cluster import shared_disk, worker_setup
from verl_aqn.cluster.shared_disk import LIMIT, limit, wait_until
from verl_aqn.cluster.worker_setup import LAUNCH, launch_mark, take_environment
from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.integrations.verl import cluster_nodes
from verl_aqn.runs.folder import RunFolder, open_run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(shared_disk, "_POLL_S", 0.01)
    monkeypatch.setenv(LIMIT, "20")


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """The folder of a run in its second attempt, in a worker that has not taken its environment yet."""
    run = open_run(tmp_path, {})
    run.replace_text("launch.yaml", "second")
    monkeypatch.setenv(LAUNCH, launch_mark(run))
    monkeypatch.setenv(worker_setup.TEMPORARY, str(tmp_path))
    monkeypatch.setattr(worker_setup, "_done", False)
    monkeypatch.setattr(worker_setup, "_began", time.monotonic())
    monkeypatch.setattr(worker_setup, "launched", lambda run: (run.path / "launch.yaml").read_text())
    monkeypatch.setattr(worker_setup, "worker_environment", lambda run, config, temporary: {"AQN_TEST_CONFIG": config})
    monkeypatch.setenv("AQN_TEST_CONFIG", "none")
    return run


@pytest.mark.parametrize("before", ["first", None], ids=["the first attempt's", "none"])
def test_a_worker_takes_its_environment_from_its_own_attempt(worker, before):
    path = worker.path / "launch.yaml"
    path.unlink()
    if before:
        worker.replace_text("launch.yaml", before)
    later = threading.Timer(0.3, worker.replace_text, ["launch.yaml", "second"])
    later.start()
    assert take_environment(worker)
    later.join()
    assert os.environ["AQN_TEST_CONFIG"] == "second"


def test_after_the_limit_a_worker_has_no_environment_and_waits_no_second_time(worker, monkeypatch):
    monkeypatch.setenv(LIMIT, "0.3")
    worker.replace_text("launch.yaml", "first")
    assert not take_environment(worker)
    began = time.monotonic()
    assert not take_environment(worker)
    assert time.monotonic() - began < 0.2
    assert os.environ["AQN_TEST_CONFIG"] == "none"
    fault = cluster_nodes._not_seen("10.0.0.1", worker.path / "launch.yaml")
    assert f"node 10.0.0.1 still sees an earlier attempt's {worker.path}/launch.yaml" in str(fault)
    assert "if the disk is shared and only slow, set VERL_AQN_DISK_WAIT_S to more than 0.3" in str(fault)


def test_the_mark_changes_with_the_attempt_and_the_config(worker):
    first = launch_mark(worker)
    worker.replace_text("launch.yaml", "third")
    second = launch_mark(worker)
    state = (worker.path / "state.json").read_text()
    (worker.path / "state.json").write_text(state.replace('"attempt": 1', '"attempt": 2'))
    assert len({first, second, launch_mark(worker)}) == 3
    (worker.path / "state.json").write_text(state[:20])  # only the beginning is seen yet
    assert launch_mark(worker) is None


def test_the_limit_is_a_number_of_seconds(monkeypatch):
    monkeypatch.delenv(LIMIT)
    assert limit() == 90
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(LIMIT, text)
        with pytest.raises(ConfigError, match=f"{LIMIT}={text} is not a number of seconds"):
            limit()


def test_a_condition_is_asked_once_also_after_the_limit():
    asked = []
    assert wait_until(lambda: not asked.append(1), began=time.monotonic() - 100)
    assert not wait_until(lambda: bool(asked.append(1)), began=time.monotonic() - 100)
    assert len(asked) == 2


def test_the_end_of_a_run_waits_for_the_records_of_other_nodes(tmp_path, monkeypatch):
    run = open_run(tmp_path, {})
    run.append("metrics.jsonl", {"step": 1})
    there = {"metrics.jsonl": 2 * (run.path / "metrics.jsonl").stat().st_size}
    monkeypatch.setattr(cluster_nodes, "on_every_node", lambda function, folder: [there, function(folder)])
    later = threading.Timer(0.3, RunFolder(run.path).append, ["metrics.jsonl", {"step": 2}])
    later.start()
    cluster_nodes.settle(run)
    later.join()
    assert [record["step"] for record in run.read("metrics.jsonl")] == [1, 2]
    monkeypatch.setenv(LIMIT, "0.1")
    there["metrics.jsonl"] += 1
    with pytest.raises(EnvironmentFault, match=r"this node does not see all records of .* that other nodes wrote"):
        cluster_nodes.settle(run)
