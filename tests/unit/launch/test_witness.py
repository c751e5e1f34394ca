"""What is known about a run's end: when a recorded error must end it, and which deaths count as causes."""

import json
import shutil
import subprocess
import time

import pytest

from verl_aqn.launch import witness
from verl_aqn.launch.cause import Fault
from verl_aqn.launch.forkserver.server import ENDS
from verl_aqn.launch.watchdog import Watchdog
from verl_aqn.runs import faults
from verl_aqn.runs.phases import ENDING

WORKER = {"process": "VLLM::Worker", "pid": 41, "type": "ValueError", "text": "boom", "where": "a/b.py:1", "full": "",
          "ours": False, "ends": True}  # fmt: skip


@pytest.fixture
def dog(tmp_path):
    dog = Watchdog(10, tmp_path)
    dog.record("events.jsonl", {"kind": "doing", "phase": "generation", "step": 3, "time": 100.0})
    dog.record("events.jsonl", {"kind": "doing", "phase": "update", "step": 3, "time": 200.0})
    return dog


@pytest.fixture
def seen(dog, tmp_path):
    return witness.Witness(tmp_path, dog)


def last(text="the training process ended with exit code 1") -> Fault:
    return Fault(time.time(), "", 0, "ProcessFault", text, ours=True)


def test_a_run_that_does_not_say_that_it_ends_is_ended(seen, dog):
    seen.record(faults.FILE, WORKER | {"time": time.time()})
    assert seen.must_end() is None, "it has a moment to say so itself"
    seen.faults.clear()
    seen.record(faults.FILE, WORKER | {"time": time.time() - witness.WORD_S - 1})
    assert seen.must_end().told() == "rollout worker (VLLM::Worker, process 41), a/b.py:1: ValueError: boom"
    dog.phase = ENDING
    assert seen.must_end() is None, "what processes say while a run ends is of no use"


@pytest.mark.parametrize("change", [{"ends": False}, {"process": "ray::Helper"}])
def test_an_error_that_is_handled_or_of_a_users_own_process_ends_nothing(seen, change):
    seen.record(faults.FILE, WORKER | change | {"time": time.time() - 100})
    assert seen.must_end() is None
    assert seen.cause(last()).text == "the training process ended with exit code 1"


def test_the_zygote_knows_how_a_process_died_and_when(seen, dog, tmp_path):
    ends = [{"pid": 41, "status": -9, "time": 150.0}, {"pid": 42, "status": 0, "time": 140.0},
            {"pid": 43, "status": -9, "time": 130.0}]  # fmt: skip
    (tmp_path / ENDS).write_text("".join(json.dumps(one) + "\n" for one in ends) + '{"pid": 44, "sta')
    dog.vital = {41: "VLLM::Worker", 42: "ray::WorkerDict", 45: "ray::RewardLoopWorker"}  # 43: the run does not need it
    dog.missed, dog.seen = {45: 160.0}, {45: 155.0}  # 45: its end is not collected yet
    cause = seen.cause(last())
    assert (
        seen.told(cause)
        == "rollout worker (VLLM::Worker, process 41) was killed by SIGKILL during generation of step 3"
    )


def test_without_a_zygote_a_death_is_silent(seen, dog):
    dog.vital, dog.missed, dog.seen = {45: "ray::RewardLoopWorker"}, {45: 260.0}, {45: 255.0}
    assert seen.told(seen.cause(last())) == (
        "reward worker (ray::RewardLoopWorker, process 45) died without an error message: killed, out of memory, or a "
        "crash in native code during update of step 3"
    )


def test_ray_s_servers_are_nobodys_children_of_a_zygote(seen, dog, tmp_path):
    (tmp_path / ENDS).touch()
    dog.vital, dog.missed, dog.seen = {46: "raylet"}, {46: 260.0}, {46: 255.0}
    assert seen.told(seen.cause(last())).startswith("Ray's node (raylet, process 46) died")


def test_the_kernels_killer_is_named_where_it_was_at_work(seen, dog, tmp_path, monkeypatch):
    (tmp_path / ENDS).write_text(json.dumps({"pid": 41, "status": -9, "time": 150.0}) + "\n")
    dog.vital = {41: "VLLM::Worker"}
    monkeypatch.setattr(witness, "oom_kills", lambda: seen.oom_before + 1)
    assert seen.told(seen.cause(last())).endswith("(meanwhile the kernel killed a process because memory ran out)")


def test_a_hang_is_told_as_such(seen):
    text = "sync of step 3 has taken 600 s (usually 2 s): the run hangs"
    assert seen.told(seen.cause(last(text))) == text


def test_when_a_process_was_missed_is_told_by_the_clock_of_errors(seen, dog):
    """The watchdog's own clock has an arbitrary start, so that no death would be late."""
    with subprocess.Popen(["gcs_server", "60"], executable=shutil.which("sleep")) as process:
        dog.look()
        process.kill()
    began_to_end = time.time()
    dog.look()
    assert seen.deaths(began_to_end) == [], "Ray's servers are the first that a run itself ends"
    assert [death.pid for death in seen.deaths(time.time())] == [process.pid]


def test_ray_s_servers_that_are_missed_as_the_run_ends_are_not_blamed(seen, dog, tmp_path):
    """The driver ends them at once, before the watchdog checks."""
    (tmp_path / ENDS).write_text(json.dumps({"pid": 41, "status": -9, "time": 150.0}) + "\n")
    dog.vital = {41: "ray::WorkerDict", 46: "raylet"}
    dog.missed, dog.seen = {46: time.time() + 0.5}, {46: 145.0}
    full = "The actor died unexpectedly …\n\tclass_name: WorkerDict\n\tpid: 41\n"
    said = Fault(time.time(), "verl_aqn.launch.driver", 1, "ActorDiedError", "The actor died unexpectedly …", full=full)
    assert seen.told(seen.cause(said)).startswith("actor (ray::WorkerDict, process 41) was killed by SIGKILL")
    bare = Fault(time.time(), "verl_aqn.launch.driver", 1, "ActorDiedError", "The actor died unexpectedly …")
    (tmp_path / ENDS).write_text("")
    assert seen.cause(bare) == bare
