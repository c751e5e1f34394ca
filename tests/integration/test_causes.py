"""For a fault in any process and phase, a run ends within seconds with that first error as its message.

Each fault has its own attempt of one run, which then resumes from its last checkpoint. `--all-kills` adds more faults.
"""

import itertools
import json
import re

import pytest

from tests.helpers.verl_aqn_faulty import sabotage
from tests.integration.conftest import finish, leftovers, lines

SECONDS = 20  # from a fault to the next attempt; most of it is for the others to end
KILLED = r"was killed by SIG\w+ during \w+ of step \d"
NO_ANSWER = "step 1: "
# Where, how, and the beginning of the line. `calls` of the faulty function go well before.
FEW = [
    ("rollout worker, generation", "SIGSEGV", {"calls": 5}, "rollout worker (VLLM::Worker, "),
    # The actor waits for this worker's answer, and is ended while it holds the shared memory of the transfer.
    ("rollout worker, sync", "raise", {"calls": 1}, "rollout worker (VLLM::Worker, "),
    # One response's reward failed before, which is handled and unrelated to the actor's death.
    ("actor, sync", "SIGKILL", {"calls": 1}, "actor (ray::WorkerDict, "),
]
MORE = [
    ("rollout worker, start", "raise", {}, "rollout worker (VLLM::Worker, "),
    ("reward worker, start", "raise", {}, "reward worker (ray::RewardLoopWorker, "),
    ("rollout engine, start", "raise", {}, "rollout engine (VLLM::EngineCore, "),
    ("storage, generation", "raise", {}, "agent loop (ray::AqnAgentLoopWorker, "),  # says which storage
    ("agent loop, start", "raise", {}, "agent loop (ray::AqnAgentLoopWorker, "),
    ("actor, start", "raise", {}, "actor (ray::WorkerDict, "),
    ("agent loop, generation", "raise", {}, NO_ANSWER),
    ("rollout server, start", "raise", {}, "rollout server (ray::AqnHttpServer, "),
    ("rollout server, generation", "raise", {}, NO_ANSWER),
    ("request router, start", "raise", {}, "request router (ray::GlobalRequestLoadBalancer, "),
    ("request router, generation", "raise", {}, NO_ANSWER),
    ("storage's controller, start", "raise", {}, "storage's controller (ray::TransferQueueController, "),
    ("storage's controller, generation", "raise", {}, "storage's controller (ray::TransferQueueController, "),
    ("rollout engine, generation", "raise", {"calls": 5}, "rollout engine (VLLM::EngineCore, "),
    ("rollout worker, generation", "raise", {"calls": 5}, "rollout worker (VLLM::Worker, "),
    ("actor, sync", "raise", {"calls": 1}, "actor (ray::WorkerDict, "),
]
HANDLED = {"at": "reward worker, reward", "how": "raise", "text": "no opinion", "times": 1}


CRITIC = [("critic, values", "raise", {}, "actor (ray::WorkerDict, ")]  # one process has the actor and the critic
MORE_CRITIC = [("critic, start", "raise", {}, "actor (ray::WorkerDict, ")]


@pytest.mark.timeout(1800)
def test_the_first_error_is_the_line(fail, request):
    faults = [*MORE, *FEW] if request.config.getoption("--all-kills") else FEW
    # A fraction of failures is allowed: otherwise the first one would end the run, and a reward is never retried.
    handled = HANDLED | {"attempt": len(faults)}
    run, told = fail(faults, [handled], ["aqn.run.allow_failed=0.9"])
    assert all("no opinion" not in line for line in told)
    assert any(one["text"] == "no opinion" for one in lines(run / "errors.jsonl")), "it was there, and handled"


def test_the_first_error_of_a_critic_is_the_line(fail, request):
    faults = [*MORE_CRITIC, *CRITIC] if request.config.getoption("--all-kills") else CRITIC
    fail(faults, recipe="ppo")


@pytest.fixture
def fail(train, tmp_path, monkeypatch):
    """`fail(faults)` → (run folder, the warning of each fault) of a run that ends well at last.

    It checks the line and the time of each fault. `handled`: further entries of the plan, which end no attempt.
    """

    def start(faults, handled=(), overrides=(), recipe="e12_aggressive_1ep"):
        plan = [{"at": at, "attempt": number, "how": how, "text": f"planned fault {number}", **options}
                for number, (at, how, options, _) in enumerate(faults, 1)]  # fmt: skip
        for name, value in sabotage(tmp_path, *plan, *handled).items():
            monkeypatch.setenv(name, value)
        short = [
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            "trainer.total_training_steps=2",
            "algorithm.filter_groups.enable=false",
            "--restarts",
            str(len(faults)),
        ]
        before = leftovers()
        process = train(tmp_path / "run", *overrides, *short, recipe=recipe)
        run, said = finish(process, tmp_path / "run")
        assert leftovers() <= before
        told = re.findall(r"warning: (.*): restart \d+ of", said)
        print(*told, times(run), sep="\n")
        assert len(told) == len(faults), said
        for number, ((at, how, _, beginning), line) in enumerate(zip(faults, told, strict=True), 1):
            assert line.startswith(beginning), told
            assert re.search(KILLED if how != "raise" else f"planned fault {number}\\b", line), told
            assert beginning != NO_ANSWER or f"[{at.partition(',')[0]} (ray::" in line, told  # which process that was
        assert max(times(run)) < SECONDS, told
        assert json.loads((run / "state.json").read_text())["status"] == "finished"
        return run, told

    return start


def times(run) -> list[float]:
    """Return seconds from the first recorded fault of each attempt to the next attempt."""
    starts = [one["since"] for one in lines(run / "events.jsonl", "temporary")]
    noted = [one["time"] for one in lines(run / "errors.jsonl") if "planned" in one["text"]]
    found = []
    for began, ended in itertools.pairwise(starts):
        inside = [time for time in noted if began <= time <= ended]
        found += [ended - min(inside)] if inside else []
    return found
