"""A run with an abnormal end is reported from what its processes record and show, in seconds and in one line.

The processes are small ones that write what a run's would.
"""

import os
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from verl_aqn.config.compose import load_recipe
from verl_aqn.launch import supervise
from verl_aqn.runs.folder import open_run

START = """
import json, os, signal, sys, time
from pathlib import Path
from verl_aqn.runs.faults import describe, note, watch
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stacks import listen
run = RunFolder(Path(sys.argv[1]))
def error(fault): run.append("events.jsonl", {"kind": "error", "text": "seen", "again": True, "fault": fault})
def doing(phase): run.append("events.jsonl", {"kind": "doing", "phase": phase, "step": 2, "time": time.time()})
def title(name):  # as Ray's and vLLM's processes have
    import verl_aqn.runs.faults
    verl_aqn.runs.faults.own_name = lambda: name
doing("sync")
"""
NOTED = 'title("VLLM::Worker_TP1"); note(ValueError("boom of rank 1"), ends=True)\n'
HANDLED = 'title("ray::WorkerDict"); note(ValueError("try again"))\n'


@pytest.fixture
def end(tmp_path, monkeypatch):
    """`end(program)`: outcome of a run whose training process runs the program, and the seconds it took."""
    run = open_run(tmp_path / "runs of a test", {})
    OmegaConf.save(load_recipe("e12", ["profile=cuda", "experiment=embedded"]), run.path / "launch.yaml")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def start(module, arguments, env, log):
        command = [sys.executable, tmp_path / "program.py", *map(str, arguments)]
        with log.open("ab") as output:
            path = os.pathsep.join(sys.path)
            return subprocess.Popen(command, env={**env, "PYTHONPATH": path}, stdout=output, stderr=output)

    monkeypatch.setattr(supervise, "start_module", start)

    class Listener:
        def record(self, name, record): ...

    def ended(program):
        (tmp_path / "program.py").write_text(START + program)
        began = time.monotonic()
        outcome = supervise.supervise(run, Listener())
        return outcome, time.monotonic() - began, run.log.read_text()

    return ended


def test_a_rank_that_failed_while_all_wait_for_it_ends_the_run(end):
    outcome, seconds, log = end(NOTED + "time.sleep(600)")
    assert (outcome.status, outcome.again) == ("failed", True), log
    assert outcome.message.startswith("rollout worker (VLLM::Worker_TP1, process ")
    assert outcome.message.endswith("ValueError: boom of rank 1")
    assert seconds < 120  # on a busy machine; the other processes wait for ten minutes


def test_what_the_driver_saw_is_not_what_happened_first(end):
    outcome, _, log = end(NOTED + 'title("driver"); error(describe(TypeError("what came of it"))); sys.exit(1)')
    assert outcome.message.endswith("ValueError: boom of rank 1"), log


def test_what_was_handled_before_is_not_what_the_driver_saw(end):
    outcome, _, log = end(
        HANDLED + 'title("ray::AqnTaskRunner"); error(describe(TypeError("bad operand"))); sys.exit(1)'
    )
    assert outcome.message.startswith("trainer (ray::AqnTaskRunner, process "), log
    assert outcome.message.endswith("TypeError: bad operand")


def test_a_driver_that_is_killed_is_named(end):
    outcome, _, log = end(HANDLED + "time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome.message.startswith("driver (verl_aqn.launch.driver, process "), log
    assert outcome.message.endswith("was killed by SIGKILL during sync of step 2")


@pytest.mark.parametrize(("how", "text"), [
    ("import ctypes; ctypes.string_at(0)", "crashed: Segmentation fault, "),
    ("os.kill(os.getpid(), signal.SIGKILL)", "died without an error message: "),
])  # fmt: skip
def test_a_child_that_dies_is_named(end, how, text):
    """Its driver does not notice. Without a zygote, only a crash leaves a description of the death."""
    outcome, seconds, log = end(
        "if os.fork() == 0:\n"
        "    listen(); import psutil, setproctitle; setproctitle.setproctitle('ray::WorkerDict.update_actor')\n"
        f"    time.sleep(6); {how}\n"
        "time.sleep(600)"
    )
    assert outcome.message.startswith("actor (ray::WorkerDict, process "), log
    assert text in outcome.message
    assert outcome.message.endswith(" during sync of step 2")
    assert seconds < 30
    assert ("Fatal Python error: Segmentation fault" in log) == ("ctypes" in how)


def test_a_driver_that_says_nothing(end):
    outcome, _, log = end("sys.exit(7)")
    assert outcome.message == "the training process ended with exit code 7", log
