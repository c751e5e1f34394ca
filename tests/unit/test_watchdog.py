"""A run that hangs or lost a process is noticed, and every process tells where it stands."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from verl_aqn import stacks, watchdog
from verl_aqn.watchdog import ENDING, FIRST_S, LEAST_S, Watchdog

# Hangs in C with the interpreter's lock held, so that no Python code of the process can ever run again.
HANGING = (
    "from verl_aqn.stacks import listen; import ctypes, sys; listen()\n"
    "def the_place_where_it_hangs():\n"
    "    print('up', flush=True)\n"
    "    while True: ctypes.PyDLL(None).sleep(100)\n"  # a signal cuts it short
    "the_place_where_it_hangs()\n"
)


@pytest.fixture
def hanging(tmp_path):
    """A process that promised its stacks to tmp_path, and hangs."""
    env = {**os.environ, stacks.FOLDER: str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", HANGING], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.communicate()


def phases(dog: Watchdog, *durations: float, phase: str = "update") -> None:
    """Steps of two phases; each `durations` seconds long, the other one second. The last of `phase` still runs."""
    at = time.time() - sum(durations) - len(durations)
    for step, seconds in enumerate(durations):
        dog.record("events.jsonl", {"kind": "doing", "phase": phase, "step": step, "time": at})
        dog.record("events.jsonl", {"kind": "doing", "phase": "sync", "step": step, "time": at + seconds})
        at += seconds + 1
    dog.record("events.jsonl", {"kind": "doing", "phase": phase, "step": len(durations), "time": time.time()})


def test_ten_times_the_usual_is_late(tmp_path):
    dog = Watchdog(10, tmp_path)
    phases(dog, 20, 10, 30)
    assert dog.limit() == pytest.approx(200)
    assert dog.fault() == ""
    dog.since -= 201
    assert dog.fault() == "update of step 3 has taken 201 s (20 s are usual): the run hangs"
    quick = Watchdog(10, tmp_path)
    phases(quick, 1, 1, 1)
    assert quick.limit() == LEAST_S


def test_what_refills_a_batch_is_no_generation_of_its_own(tmp_path):
    """Groups without variance are drawn anew one by one; the last of them may take as long as generation ever takes."""
    dog = Watchdog(10, tmp_path)
    at = time.time() - 1000
    for step in (1, 2):
        for refill in range(100):
            dog.record("events.jsonl", {"kind": "doing", "phase": "generation", "step": step, "time": at + refill})
            assert dog.limit() == (FIRST_S if step == 1 else 1200)
        dog.record("events.jsonl", {"kind": "doing", "phase": "update", "step": step, "time": at + 120})
        at += 130
    assert dog.durations["generation"] == [pytest.approx(120)] * 2


def test_a_first_time_has_no_usual_and_patience_0_waits_for_ever(tmp_path):
    dog = Watchdog(10, tmp_path)
    dog.record("events.jsonl", {"kind": "phase", "text": "loading the actor", "time": time.time() - 1})
    assert dog.limit() == FIRST_S
    dog.since -= FIRST_S
    assert "loading the actor has taken" in dog.fault()
    endless = Watchdog(0, tmp_path)
    endless.since -= 1e9
    assert endless.fault() == ""


def test_a_process_that_dies_is_missed_unless_the_run_ends(tmp_path, hanging, monkeypatch):
    monkeypatch.setattr(watchdog, "GRACE_S", 0.2)
    monkeypatch.setattr(watchdog, "LOOK_S", 0)
    dog = Watchdog(10, tmp_path)
    dog.record("events.jsonl", {"kind": "doing", "phase": "generation", "step": 4, "time": time.time()})
    assert dog.fault() == ""
    assert list(dog.vital) == [hanging.pid]
    hanging.kill()
    time.sleep(0.1)
    assert dog.fault() == "", "the run has a moment to say itself what happened"
    time.sleep(0.3)
    assert f"(process {hanging.pid}) died during generation of step 4" in dog.fault()
    dog.record("events.jsonl", {"kind": "doing", "phase": ENDING, "step": 4, "time": time.time()})
    assert dog.fault() == ""


def test_ray_s_own_servers_are_missed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_S", 0)
    monkeypatch.setattr(watchdog, "RAY_GRACE_S", 0.2)
    server = subprocess.Popen(["bash", "-c", "exec -a gcs_server sleep 100"])
    try:
        while watchdog.title(psutil.Process(server.pid)) != "gcs_server":
            time.sleep(0.01)
        dog = Watchdog(10, tmp_path)
        assert dog.fault() == ""
        server.kill()
        server.wait()
        assert dog.fault() == "", "it may have been ended because the run was"
        time.sleep(0.3)
        assert dog.fault() == f"gcs_server (process {server.pid}) died during starting"
    finally:
        server.kill()
        server.wait()


def test_a_process_in_which_vllm_looks_at_an_architecture_may_end(tmp_path, hanging, monkeypatch):
    monkeypatch.setattr(watchdog, "GRACE_S", 0)
    monkeypatch.setattr(watchdog, "LOOK_S", 0)
    monkeypatch.setattr(watchdog, "title", lambda process: "vllm.model_executor.models.registry")
    dog = Watchdog(10, tmp_path)
    assert dog.fault() == ""
    hanging.kill()
    time.sleep(0.1)
    assert [dog.fault() for _ in range(2)] == ["", ""]


def test_a_process_that_hangs_in_c_tells_where(tmp_path, hanging):
    text = stacks.collect(tmp_path, {hanging.pid: "ray::AqnActorWorker", 999999: "gone"})
    assert text.startswith(f"== {hanging.pid} ray::AqnActorWorker\n")
    assert "the_place_where_it_hangs" in text
    assert "999999" not in text
    assert hanging.poll() is None


def test_outside_a_run_nothing_is_promised(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != stacks.FOLDER}
    code = "from verl_aqn.stacks import SIGNAL, listen; listen(); import faulthandler as f; print(f.unregister(SIGNAL))"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out == "False\n"


@pytest.mark.parametrize(("how", "why"), [
    ("import ctypes; ctypes.string_at(0)", "Segmentation fault"), ("import os; os.abort()", "Aborted"),
])  # fmt: skip
def test_a_process_that_crashes_in_c_tells_where(tmp_path, how, why):
    program = tmp_path / "program.py"
    program.write_text(f"from verl_aqn.stacks import listen; listen()\n{how}\n")
    env = {**os.environ, stacks.FOLDER: str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, program], env=env) as process:
        assert process.wait() < 0
    told = stacks.crash(tmp_path, process.pid)
    assert told.startswith(why)
    assert re.search(r"(program|ctypes/__init__)\.py:\d+$", told)
    assert stacks.crash(tmp_path, 999999) == ""
    assert stacks.crashes(tmp_path).startswith(f"== {process.pid} crashed\nFatal Python error: {why}")


def test_a_process_that_only_told_its_stacks_has_not_crashed(tmp_path, hanging):
    stacks.collect(tmp_path, {hanging.pid: "any"})
    assert stacks.crash(tmp_path, hanging.pid) == ""


def test_the_phase_of_a_moment(tmp_path):
    dog = Watchdog(10, tmp_path)
    for time_, phase in ((10.0, "generation"), (20.0, "update")):
        dog.record("events.jsonl", {"kind": "doing", "phase": phase, "step": 2, "time": time_})
    assert [dog.where_at(at) for at in (5, 15, 25)] == ["starting", "generation of step 2", "update of step 2"]


@pytest.mark.parametrize(("line", "name"), [
    (["ray::WorkerDict.actor_rollout_update_actor"], "ray::WorkerDict"),
    (["ray::agent_loop_worker_0_f9.2:AgentLoopWorkerTQ.__init__"], "ray::AgentLoopWorkerTQ"),
    (["ray::IDLE"], "ray::IDLE"),
    (["VLLM::Worker_TP0"], "VLLM::Worker_TP0"),
    (["/usr/bin/python3.11", "-m", "verl_aqn.verl_api.run", "folder"], "verl_aqn.verl_api.run"),
    (["/opt/ray/raylet", "--node"], "raylet"),
])  # fmt: skip
def test_what_processes_call_themselves(line, name):
    assert watchdog.title(SimpleNamespace(cmdline=lambda: line)) == name
