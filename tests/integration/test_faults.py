"""Kill any process in any phase: the run gives the same results as an undisturbed one and leaves nothing behind.

By default three processes are killed. `pytest tests/integration/test_faults.py --all-kills -s` kills every kind of
process in every phase in which it works, and prints one line for each. One run is killed several times and resumes.
"""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import descendants, finish, leftovers, lines, lines_of, newest
from verl_aqn.runs.processes import title

# Kind of process → its title.
KINDS = {
    "actor rank": "ray::WorkerDict",
    "rollout worker": "VLLM::Worker",
    "rollout engine": "VLLM::EngineCore",
    "rollout server": "ray::AqnHttpServer",
    "agent loop": "ray::AqnAgentLoopWorker",
    "rewards": "ray::RewardLoopWorker",
    "storage": "ray::SimpleStorageUnit",
    "trainer": "ray::AqnTaskRunner",
    "node": "raylet",
    "head": "gcs_server",
    "driver": "verl_aqn.launch.driver",
}
PHASES = ("generation", "log-probs", "update", "sync", "checkpoint", "validation")
# Steps enough for all kills of a run: a few seconds pass until one takes effect. From the second on there is a
# checkpoint to go back to.
STEPS = ["trainer.total_training_steps=8", "trainer.test_freq=1"]
FEW = [[("head", "generation"), ("actor rank", "update"), ("rollout worker", "validation")]]
ALL = [
    *([(kind, phase) for phase in PHASES] for kind in ("actor rank", "rollout worker", "rollout engine", "trainer")),
    [(kind, phase) for phase in ("generation", "validation") for kind in ("rollout server", "agent loop")],
    [("rewards", "generation"), ("storage", "generation"), ("driver", "generation")],
    *([(kind, phase) for phase in ("generation", "update", "checkpoint")] for kind in ("node", "head")),
]


def pytest_generate_tests(metafunc):
    if "kills" in metafunc.fixturenames:
        chosen = ALL if metafunc.config.getoption("--all-kills") else FEW
        names = [", ".join(dict.fromkeys(kind for kind, _ in kills)) for kills in chosen]
        metafunc.parametrize("kills", chosen, ids=names)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("undisturbed")
    return finish(train(base, *STEPS), base)[0]


def told(folder: Path) -> dict:
    """Return what a run did, without what differs between any two runs: sampled responses and times."""
    noise = lines(folder / "evidence.jsonl", "noise")
    steps = {one["step"]: one for one in lines(folder / "metrics.jsonl", "step")}
    return {
        "steps": {step: sorted(one["metrics"]) for step, one in sorted(steps.items())},
        "sigma": {step: one["metrics"]["aqn/sigma"] for step, one in sorted(steps.items())},
        "noise": {one["step"]: (one["sigma_target"], one["weights_digest"]) for one in noise},
        "validations": {one["step"]: one["items"] for one in lines(folder / "metrics.jsonl", "validation")},
        "base": {one["disk"] for one in lines(folder / "evidence.jsonl", "base")},
        "checkpoint": (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text(),
        "status": json.loads((folder / "state.json").read_text())["status"],
    }


@pytest.mark.timeout(3600)
def test_processes_are_killed(kills, train, undisturbed, tmp_path):
    before = leftovers()
    process = train(tmp_path, *STEPS, "--restarts", str(len(kills)))
    victims = []
    for number, (kind, phase) in enumerate(kills):
        await_phase(process, tmp_path, number, phase)
        victim = find(process, KINDS[kind])
        os.kill(victim.pid, signal.SIGKILL)
        victims.append(victim)
        killed = time.monotonic()
        if number + 1 < len(kills):
            await_phase(process, tmp_path, number + 1, None)
            print(f"FAULT {kind} | {phase} | {time.monotonic() - killed:.0f} s")
    _, err = process.communicate(timeout=900)
    print(f"FAULT {kind} | {phase} | the end")
    folder = newest(tmp_path)
    assert process.returncode == 0, err + (folder / "training.log").read_text()[-3000:]
    assert f"restart {len(kills)} of {len(kills)}" in err.replace("\n", " ")
    assert json.loads((folder / "state.json").read_text())["attempt"] == len(kills) + 1
    assert told(folder) == told(undisturbed)
    assert leftovers() <= before
    for victim in victims:
        assert not psutil.pid_exists(victim.pid) or psutil.Process(victim.pid).create_time() > victim.create_time()


def find(process: subprocess.Popen, what: str) -> psutil.Process:
    """Find a process of a run by its title, which Ray and vLLM may change at this moment."""
    for _ in range(50):
        found = []
        for child in descendants(process.pid):
            with suppress(psutil.Error):
                found += [child] if title(child) == what else []
        if found:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no {what} among {[child.cmdline() for child in descendants(process.pid)]}")


def await_phase(process: subprocess.Popen, base: Path, restarts: int, phase: str | None) -> None:
    """Wait until the run, after this many restarts, is in `phase` of a step after the first; None: of any step."""
    deadline = time.monotonic() + 600
    while True:
        events = lines_of(base)
        starts = [place for place, one in enumerate(events) if one["kind"] == "temporary"]
        doing = [one for one in events[starts[restarts] :] if one["kind"] == "doing"] if len(starts) > restarts else []
        if any(phase is None or (one["phase"] == phase and one.get("step", 0) > 1) for one in doing):
            return
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, (phase, events[-3:])
        time.sleep(0.02)
