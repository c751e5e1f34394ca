"""Whatever process fails first, in whatever phase: its own first error is the line that the run ends with, in seconds.

Each fault is in an attempt of its own of one run, which then goes on from its last checkpoint to its end.
"""

import itertools
import json
import re

import pytest

from tests.integration.conftest import finish, lines
from tests.verl_aqn_faulty import sabotage

SECONDS = 20  # from a fault to the next attempt; most of it is for the others to end
# Where, how, and the line's beginning and end. `calls` of the faulty function go well before.
KILLED = r"was killed by SIG\w+ during \w+ of step \d"
AT_START = [
    ("reward worker, start", "raise", {}, "reward worker (ray::RewardLoopWorker"),
    ("agent loop, start", "raise", {}, "agent loop (ray::AqnAgentLoopWorker"),
    ("rollout engine, start", "raise", {}, "rollout engine (VLLM::EngineCore"),
    ("rollout worker, start", "raise", {}, "rollout worker ("),
    ("actor, start", "raise", {}, "actor (ray::WorkerDict"),
]
LATER = [
    ("reward worker, reward", "raise", {}, "step 1: every answer to 2 problems failed: ValueError: planned"),
    ("rollout engine, generation", "raise", {"calls": 5}, "rollout engine (VLLM::EngineCore"),
    ("rollout worker, generation", "raise", {"calls": 5}, "rollout worker (VLLM::Worker"),
    ("rollout worker, generation", "SIGSEGV", {"calls": 5}, "rollout worker (VLLM::Worker"),
    ("storage, generation", "raise", {}, "agent loop (ray::AqnAgentLoopWorker"),  # says which storage
    ("rollout worker, sync", "raise", {"calls": 1}, "rollout worker (VLLM::Worker"),
    # After one answer's reward failed, which is handled: it has nothing to do with the actor's death.
    ("actor, sync", "SIGKILL", {"calls": 1}, "actor (ray::WorkerDict"),
]
HANDLED = {"at": "reward worker, reward", "how": "raise", "text": "no opinion", "times": 1}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("faults", [AT_START, LATER], ids=["start", "later"])
def test_the_first_error_is_the_line(faults, train, tmp_path, monkeypatch):
    plan = [{"at": at, "attempt": number, "how": how, "text": f"planned fault {number}", **more}
            for number, (at, how, more, _) in enumerate(faults, 1)]  # fmt: skip
    plan += [HANDLED | {"attempt": len(faults)}] if faults is LATER else []
    for name, value in sabotage(tmp_path, *plan).items():
        monkeypatch.setenv(name, value)
    short = ["trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.total_training_steps=2"]
    process = train(tmp_path / "run", *short, "algorithm.filter_groups.enable=false", "--restarts", str(len(faults)))
    run, said = finish(process, tmp_path / "run")
    told = re.findall(r"warning: (.*): restart \d+ of", said)
    assert len(told) == len(faults), said
    for number, ((_, how, _, beginning), line) in enumerate(zip(faults, told, strict=True), 1):
        assert line.startswith(beginning), told
        assert re.search(KILLED if how != "raise" else f"planned fault {number}\\b", line), told
        assert "no opinion" not in line
    assert "every answer" not in "".join(told) or re.search(r"\[reward worker \(ray::RewardLoopWorker, ", said)
    for seconds in times(run):
        assert seconds < SECONDS, (times(run), told)
    assert any(one["text"] == "no opinion" for one in lines(run / "errors.jsonl")) == (faults is LATER)
    assert json.loads((run / "state.json").read_text())["status"] == "finished"


def times(run) -> list[float]:
    """Seconds from the first fault that was noted in each attempt to the next attempt."""
    starts = [one["since"] for one in lines(run / "events.jsonl", "temporary")]
    noted = [one["time"] for one in lines(run / "errors.jsonl") if "planned" in one["text"]]
    found = []
    for began, ended in itertools.pairwise(starts):
        inside = [time for time in noted if began <= time <= ended]
        found += [ended - min(inside)] if inside else []
    return found
