"""A run that hangs or has lost a process is detected, and every process reports its stacks."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from verl_aqn.launch import watchdog
from verl_aqn.launch.watchdog import FIRST_S, GRACE_S, LEAST_S, LOOK_S, RAY_GRACE_S, WEIGH_S, Watchdog
from verl_aqn.runs import stacks
from verl_aqn.runs.phases import ENDING, TRACKERS
from verl_aqn.runs.processes import title

PASSING = "vllm.model_executor.models.registry"  # inspects an architecture that is new to vLLM, and ends

# Hangs in C with the interpreter's lock held, so that no Python code of the process can ever run again.
HANGING = (
    "from verl_aqn.runs.stacks import listen; import ctypes, sys; listen()\n"
    "def the_place_where_it_hangs():\n"
    "    print('up', flush=True)\n"
    "    while True: ctypes.PyDLL(None).sleep(100)\n"  # a signal shortens it
    "the_place_where_it_hangs()\n"
)


@pytest.fixture
def hanging(tmp_path):
    """A process that writes its stacks to tmp_path on request, and hangs."""
    env = {**os.environ, stacks.FOLDER: str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", HANGING], env=env, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.communicate()


class Clock:
    """The watchdog's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def blind(hang_timeout_factor: float, tmp_path, clock: Clock, **more) -> Watchdog:
    """A watchdog that does not check processes, because each check reads all processes of the machine."""
    dog = Watchdog(hang_timeout_factor, tmp_path, clock=clock, **more)
    dog.look = lambda: None
    return dog


def begin(dog: Watchdog, phase: str, step: int | None = None) -> None:
    kind = {"kind": "phase", "text": phase} if step is None else {"kind": "doing", "phase": phase, "step": step}
    dog.record("events.jsonl", {**kind, "time": -1.0})  # of another machine's clock


def wait(dog: Watchdog, clock: Clock, seconds: float, work: bool = False) -> str:
    """Return the watchdog's first fault within this time, asked every 10 s; `work`: a process of the run is busy."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now = min(end, clock.now + 10)
        if work:
            dog.worked = clock.now
        if fault := dog.fault():
            return fault
    return ""


def steps(dog: Watchdog, clock: Clock, *durations: float, phase: str = "update") -> None:
    """Record steps of two phases: `phase` takes `durations` seconds, the other one second. The last `phase` begins."""
    for step, seconds in enumerate(durations):
        begin(dog, phase, step)
        wait(dog, clock, seconds)
        begin(dog, "sync", step)
        wait(dog, clock, 1)
    begin(dog, phase, len(durations))


def test_ten_times_the_usual_is_late(tmp_path, clock):
    dog = blind(10, tmp_path, clock)
    steps(dog, clock, 20, 10, 30)
    assert dog.limit() == 200
    assert wait(dog, clock, 200) == ""
    assert wait(dog, clock, 10) == "update of step 3 has taken 210 s (usually 20 s): the run hangs"
    quick = blind(10, tmp_path, clock)
    steps(quick, clock, 1, 1, 1)
    assert quick.limit() == LEAST_S


def test_what_refills_a_batch_is_no_generation_of_its_own(tmp_path, clock):
    """Groups without variance are drawn again one by one; the last one may take as long as a whole generation."""
    dog = blind(10, tmp_path, clock)
    for step in (1, 2):
        for _ in range(100):
            begin(dog, "generation", step)
            assert dog.limit() == pytest.approx(float("inf") if step == 1 else 1200)
            clock.now += 1.2
        begin(dog, "update", step)
        clock.now += 10
    assert dog.durations["generation"] == [pytest.approx(120)] * 2


def test_a_first_phase_of_hours_is_left_alone_as_long_as_something_works(tmp_path, clock):
    dog = blind(10, tmp_path, clock)
    begin(dog, "loading the actor")
    told = []
    for _ in range(5):
        assert wait(dog, clock, 3600, work=True) == ""
        told += [dog.warning(), dog.warning()]
    assert [text[:33] for text in told if text] == [f"loading the actor has taken {hour} h. " for hour in range(1, 6)]
    begin(dog, "generation", 1)
    assert dog.warning() == ""


def test_a_first_phase_in_which_nothing_works_for_an_hour_hangs(tmp_path, clock):
    dog = blind(10, tmp_path, clock)
    begin(dog, "loading the actor")
    assert wait(dog, clock, FIRST_S + 600, work=True) == ""
    assert wait(dog, clock, FIRST_S) == ""
    assert wait(dog, clock, 10) == "all processes of the run were idle for 3610 s in loading the actor: the run hangs"
    elsewhere = blind(10, tmp_path, clock, alone=False)  # its processes are on other machines
    assert wait(elsewhere, clock, 10 * FIRST_S) == ""
    endless = blind(0, tmp_path, clock)
    assert wait(endless, clock, 10 * FIRST_S) == ""
    assert endless.warning() == ""


def test_a_busy_process_and_an_idle_one_are_told_apart(tmp_path, clock, hanging):
    dog = Watchdog(10, tmp_path, clock=clock)
    wait(dog, clock, WEIGH_S)
    for _ in range(5):  # the imports of `hanging` were work, and on a busy machine they may wait for a disk
        began = dog.worked
        wait(dog, clock, WEIGH_S)
        if dog.worked == began:
            break
    assert dog.worked == began, "a process that sleeps does nothing"
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while sum(psutil.Process(busy.pid).cpu_times()[:2]) < watchdog.BUSY * WEIGH_S + 0.2:
            time.sleep(0.05)
        wait(dog, clock, WEIGH_S)
        assert dog.worked == clock.now
    finally:
        busy.kill()
        busy.wait()


def test_the_last_check_of_the_base_is_as_long_as_the_first_and_not_as_a_checkpoint(tmp_path, clock):
    """The records are the trainer's.

    The base is checked at the start and at the end; the last phase of each step is short.
    """
    dog = blind(10, tmp_path, clock)
    begin(dog, "base", 0)
    wait(dog, clock, 400)
    begin(dog, "noise", 1)
    begin(dog, "checkpoint", 1)
    wait(dog, clock, 1)
    begin(dog, TRACKERS, 1)
    begin(dog, "base", 2)
    assert wait(dog, clock, 4000) == ""
    assert "base of step 2 has taken" in wait(dog, clock, 10)


def test_trackers_and_checkpoints_wait_for_what_is_outside(tmp_path, clock):
    dog = blind(10, tmp_path, clock)
    for phase, least in ((TRACKERS, 3600), ("checkpoint", 600)):
        for step in (1, 2):
            begin(dog, phase, step)
            wait(dog, clock, 1)
        begin(dog, "sync", 2)
        wait(dog, clock, 1)
        begin(dog, phase, 3)
        assert wait(dog, clock, least) == ""
        assert "the run hangs" in wait(dog, clock, 10)


def test_a_machine_that_was_asleep_has_lost_no_time(tmp_path, clock):
    """After Ctrl-Z or a paused virtual machine, watchdog and run were stopped together."""
    dog = blind(10, tmp_path, clock)
    steps(dog, clock, 1, 1, 1)
    wait(dog, clock, 50)
    clock.now += 36000
    assert dog.fault() == ""
    assert wait(dog, clock, 10) == ""
    assert "the run hangs" in wait(dog, clock, 10)


def test_a_process_that_dies_is_missed_unless_the_run_ends(tmp_path, hanging, clock, monkeypatch):
    monkeypatch.setattr(watchdog, "title", lambda process: "ray::WorkerDict")
    dog = Watchdog(10, tmp_path, clock=clock)
    begin(dog, "generation", 4)
    assert dog.fault() == ""
    assert list(dog.vital) == [hanging.pid]
    hanging.kill()
    time.sleep(0.1)
    assert wait(dog, clock, GRACE_S) == "", "the run has a moment to say itself what happened"
    assert f"ray::WorkerDict (process {hanging.pid}) died during generation of step 4" in wait(dog, clock, 20)
    begin(dog, ENDING, 4)
    assert dog.fault() == ""


@pytest.mark.parametrize("what", ["python3", "ray::grade", "ray::MyJudge", "ray::IDLE", "my_tool", PASSING])
def test_what_a_user_s_code_starts_may_end_though_it_imports_verl(tmp_path, hanging, clock, monkeypatch, what):
    monkeypatch.setattr(watchdog, "title", lambda process: what)
    dog = Watchdog(10, tmp_path, clock=clock)
    begin(dog, "generation", 4)
    assert dog.fault() == ""
    hanging.kill()
    time.sleep(0.1)
    assert wait(dog, clock, 100) == ""


def test_ray_s_own_servers_are_missed_at_once(tmp_path, clock):
    server = subprocess.Popen(["bash", "-c", "exec -a gcs_server sleep 100"])
    try:
        while title(psutil.Process(server.pid)) != "gcs_server":
            time.sleep(0.01)
        dog = Watchdog(10, tmp_path, clock=clock)
        assert dog.fault() == ""
        server.kill()
        server.wait()
        clock.now += LOOK_S
        assert dog.fault() == "", "it may have been ended because the run was"
        clock.now += RAY_GRACE_S + 1
        assert dog.fault() == f"gcs_server (process {server.pid}) died during starting"
    finally:
        server.kill()
        server.wait()


def test_a_process_that_hangs_in_c_tells_where(tmp_path, hanging):
    text = stacks.collect(tmp_path, {hanging.pid: "ray::AqnActorWorker", 999999: "gone"})
    assert text.startswith(f"== {hanging.pid} ray::AqnActorWorker\n")
    assert "the_place_where_it_hangs" in text
    assert "999999" not in text
    assert hanging.poll() is None


def test_outside_a_run_nothing_is_promised(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != stacks.FOLDER}
    code = (
        "from verl_aqn.runs.stacks import SIGNAL, listen; listen(); "
        "import faulthandler as f; print(f.unregister(SIGNAL))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out == "False\n"


@pytest.mark.parametrize(("how", "why"), [
    ("import ctypes; ctypes.string_at(0)", "Segmentation fault"), ("import os; os.abort()", "Aborted"),
])  # fmt: skip
def test_a_process_that_crashes_in_c_tells_where(tmp_path, how, why):
    program = tmp_path / "program.py"
    program.write_text(f"from verl_aqn.runs.stacks import listen; listen()\n{how}\n")
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
    (["/usr/bin/python3.11", "-m", "verl_aqn.launch.driver", "folder"], "verl_aqn.launch.driver"),
    (["/opt/ray/raylet", "--node"], "raylet"),
])  # fmt: skip
def test_what_processes_call_themselves(line, name):
    assert title(SimpleNamespace(cmdline=lambda: line)) == name
