"""The message of a failed run is its first error, in any process, and never an error that was handled."""

import pytest

from verl_aqn.launch.cause import Fault, death, find_cause

REWARD, AGENT, SERVER = "ray::RewardLoopWorker", "ray::AqnAgentLoopWorker", "ray::AqnHttpServer"
ENGINE, WORKER, ACTOR, TRAINER = "VLLM::EngineCore", "VLLM::Worker", "ray::WorkerDict", "ray::AqnTaskRunner"
DEAD_ENGINE = "EngineCore encountered an issue. See stack trace (above) for the root cause."
PIDS = {name: number for number, name in enumerate((REWARD, AGENT, SERVER, ENGINE, WORKER, ACTOR, TRAINER), 100)}


def fault(time: float, process: str, type: str, text: str, **more) -> Fault:
    return Fault(time, process, PIDS[process], type, text, full=more.pop("full", f"{type}: {text}"), **more)


def end(time: float, type: str, text: str, full: str = "", **more) -> Fault:
    """Return the driver's error."""
    return Fault(time, "verl_aqn.launch.driver", 1, type, text, full=full or f"{type}: {text}", **more)


def remote(process: str, type: str, text: str) -> str:
    """Return a record as Ray passes on an error of another process."""
    return f"RayTaskError({type}): {process}.method() (pid={PIDS[process]}, ip=10.0.0.1)\n  File …\n{type}: {text}"


def test_an_error_that_reached_the_driver_is_that_of_the_process_which_raised_it():
    boom = fault(5, REWARD, "ValueError", "boom of the reward", where="mine/reward.py:3")
    told = remote(REWARD, "ValueError", "boom of the reward")
    found = find_cause(end(6, "ValueError", "boom of the reward", told), [boom])
    assert found == boom
    assert found.told() == (
        "reward worker (ray::RewardLoopWorker, process 100), mine/reward.py:3: ValueError: boom of the reward"
    )


def test_a_creation_that_failed_is_behind_a_dead_actor():
    failed = fault(5, REWARD, "AssertionError", "overlong_buffer_cfg.len is too long", ends=True)
    last = end(7, "ActorDiedError", "The actor died unexpectedly before finishing this task.",
               f"…\n\tclass_name: RewardLoopWorker\n\tpid: {PIDS[REWARD]}\n")  # fmt: skip
    assert find_cause(last, [failed]) == failed


def test_behind_a_dead_engine_is_its_workers_error():
    """Worker → engine → server → agent loop → trainer: each error says less than the one before."""
    boom = fault(5, WORKER, "ValueError", "boom", where="mine/model.py:9", ends=True)
    engine = fault(5.1, ENGINE, "RuntimeError", "Worker failed with error 'boom', please check …", ends=True)
    server = fault(5.2, SERVER, "EngineDeadError", DEAD_ENGINE)
    last = end(
        6, "ProcessFault", f"step 2: all responses to 2 problems failed: EngineDeadError: {DEAD_ENGINE}", ours=True
    )
    assert find_cause(last, [boom, engine, server]) == boom
    assert find_cause(server, [boom, engine]) == boom


def test_of_two_ranks_the_one_that_failed_first_is_the_cause():
    first = fault(5, WORKER, "ValueError", "boom of rank 1", ends=True)
    second = Fault(5.5, WORKER, 7, "RuntimeError", "Connection closed by peer", ends=True)
    last = end(6, "EngineDeadError", DEAD_ENGINE)
    assert find_cause(last, [second, first]) == first


def test_a_process_that_was_killed_is_the_cause_of_what_missed_it():
    killed = death(5, WORKER, PIDS[WORKER], -9)
    engine = fault(5.1, ENGINE, "RuntimeError", "Executor failed.", ends=True)
    gone = death(5.3, ENGINE, PIDS[ENGINE], 1)
    found = find_cause(end(6, "EngineDeadError", DEAD_ENGINE), [killed, engine, gone])
    assert found == killed
    assert found.told() == "rollout worker (VLLM::Worker, process 104) was killed by SIGKILL"


def test_deaths_that_were_noticed_at_once_are_told_apart_by_who_said_why():
    """Without a zygote the signals are unknown, and the time is that of the last check."""
    worker, engine = death(4, WORKER, PIDS[WORKER], None), death(4, ENGINE, PIDS[ENGINE], None)
    said = fault(5.1, ENGINE, "RuntimeError", "Executor failed.", ends=True)
    assert find_cause(end(6, "EngineDeadError", DEAD_ENGINE), [engine, worker, said]) == worker


def test_a_dead_actor_is_named_with_its_signal_whoever_died_in_the_end():
    killed, others = death(5, ACTOR, PIDS[ACTOR], -11), death(6.5, REWARD, PIDS[REWARD], -15)
    last = end(6, "ActorDiedError", "The actor died unexpectedly before finishing this task.",
               f"\tpid: {PIDS[ACTOR]}\n")  # fmt: skip
    assert find_cause(last, [killed, others]).told() == "actor (ray::WorkerDict, process 105) was killed by SIGSEGV"


@pytest.mark.parametrize("last", [
    end(9, "ActorDiedError", "The actor died unexpectedly …", f"pid: {PIDS[ACTOR]}"),
    end(9, "TypeError", "unsupported operand", remote(TRAINER, "TypeError", "unsupported operand")),
    end(9, "EvidenceError", "step 3: the base is not the recorded one", ours=True),
    end(9, "ProcessFault", "sync of step 3 has taken 600 s: the run hangs", ours=True),
], ids=lambda last: last.type)  # fmt: skip
def test_an_error_that_was_handled_is_never_the_cause(last):
    """This holds for many errors, in the process that dies later, and shortly before the end."""
    handled = [
        fault(1, REWARD, "ValueError", "no opinion on this answer"),
        fault(8.9, ACTOR, "ConnectionError", "try again"),
        fault(8.95, TRAINER, "KeyError", "'x'"),
        fault(8.99, AGENT, "ValueError", "no opinion on this answer"),
    ]
    killed = death(8, ACTOR, PIDS[ACTOR], -9)
    cause = find_cause(last, [*handled, killed] if last.type == "ActorDiedError" else handled)
    assert cause == (killed if last.type == "ActorDiedError" else last)


def test_an_error_that_came_after_the_end_is_not_its_cause():
    late = fault(6.1, WORKER, "RuntimeError", "closed while the run was ending", ends=True)
    last = end(6, "EngineDeadError", DEAD_ENGINE)
    assert find_cause(last, [late]) == last


def test_the_same_text_of_another_process_is_not_taken_for_the_error_that_came():
    other = fault(5, AGENT, "KeyError", "'answer'")
    mine = fault(5.5, REWARD, "KeyError", "'answer'")
    last = end(6, "KeyError", "'answer'", remote(REWARD, "KeyError", "'answer'"))
    assert find_cause(last, [mine, other]) == mine


def test_ours_says_more_than_what_it_quotes_and_tells_where_that_was():
    boom = fault(5, REWARD, "ValueError", "boom", where="mine/reward.py:3")
    text = "step 1: all responses to 2 problems failed: ValueError: boom (8 times)"
    last = end(6, "ProcessFault", text, remote(TRAINER, "ProcessFault", text), ours=True)
    assert find_cause(last, [boom]).told() == (
        "step 1: all responses to 2 problems failed: ValueError: boom (8 times) "
        "[reward worker (ray::RewardLoopWorker, process 100), mine/reward.py:3]"
    )


def test_ours_stays_as_it_is_on_its_way_through_processes():
    text = "step 3: the base is not the recorded one"
    raised = fault(5, TRAINER, "EvidenceError", text, ours=True)
    assert find_cause(end(6, "EvidenceError", text, ours=True), [raised]).told() == text


def test_what_ray_could_not_pickle_is_found_by_its_traceback():
    lost = fault(5, AGENT, "ValidationError", "model.path: Input should be a valid string")
    lost = Fault(**{**lost.__dict__, "text": "deep word of the error"})
    full = f"RayTaskError: agent() (pid={PIDS[AGENT]}, ip=10.0.0.1)\n mod.ValidationError: deep word of the error"
    assert find_cause(end(6, "RayError", "Exception mod.ValidationError isn't serializable: …", full), [lost]) == lost


def test_an_error_of_nobody_else_stays():
    last = end(6, "TypeError", "unsupported operand")
    assert find_cause(last, []) == last
    assert last.told() == "driver (verl_aqn.launch.driver, process 1): TypeError: unsupported operand"


@pytest.mark.parametrize(("status", "text"), [
    (-9, "was killed by SIGKILL"), (-63, "was killed by signal 63"), (3, "ended with exit code 3"),
    (None, "died without an error message: killed, out of memory, or a crash in native code"),
])  # fmt: skip
def test_ways_to_die(status, text):
    assert death(5, WORKER, 4, status).text == text


def test_a_code_of_exit_counts_only_where_nothing_else_is_known():
    ended, killed = death(5, ACTOR, PIDS[ACTOR], 1), death(4, "raylet", 3, None)
    last = end(6, "ActorDiedError", "The actor died unexpectedly …", f"pid: {PIDS[ACTOR]}")
    assert find_cause(last, [ended]) == ended
    assert find_cause(last, [ended, killed]) == killed


def test_whether_another_attempt_may_go_well():
    assert death(5, ACTOR, 1, -9).by_chance
    assert fault(5, WORKER, "RuntimeError", "CUDA error").by_chance
    assert not end(5, "EnvironmentFault", "install it", ours=True).by_chance


def test_an_actor_of_whose_death_nobody_knows_is_named_by_what_ray_says():
    full = "ray::AqnTaskRunner.run() (pid=7, ip=10.0.0.1)\n…\n\tclass_name: WorkerDict\n\tpid: 3204\n\tip: 10.0.0.7\n"
    found = find_cause(end(6, "ActorDiedError", "The actor died unexpectedly before finishing this task.", full), [])
    assert found.told() == (
        "actor (ray::WorkerDict, process 3204) died without an error message: killed, out of memory, or a crash in "
        "native code"
    )


def test_a_users_own_actor_counts_where_it_is_named():
    own = Fault(5, "ray::Helper", 9, "ValueError", "no table of units", ends=True)
    last = end(6, "ActorDiedError", "The actor died unexpectedly …", "class_name: Helper\n\tpid: 9\n")
    assert find_cause(last, [own]).told() == "ray::Helper (9): ValueError: no table of units"
    other = end(6, "ActorDiedError", "The actor died unexpectedly …", f"class_name: WorkerDict\n\tpid: {PIDS[ACTOR]}\n")
    assert find_cause(other, [own]).process == ACTOR


def test_who_was_killed_comes_before_those_who_noticed_it_in_words_of_their_own():
    killed, engine = death(5, WORKER, PIDS[WORKER], -11), fault(5.1, ENGINE, "RuntimeError", "no reply", ends=True)
    assert find_cause(end(6, "EngineDeadError", DEAD_ENGINE), [killed, engine]) == killed
    assert find_cause(end(6, "TypeError", "unsupported operand"), [killed, engine]) == killed
    silent = death(5, WORKER, PIDS[WORKER], None)
    cancelled = fault(5.1, ENGINE, "RuntimeError", "cancelled", ends=True)
    assert find_cause(end(6, "EngineDeadError", DEAD_ENGINE), [silent, cancelled]) == silent


@pytest.mark.parametrize("silent", [False, True])
def test_a_trainer_that_aborts_itself_has_missed_an_actor(silent):
    crash = "Aborted, base/worker_group.py:119" if silent else ""
    killed = death(5, ACTOR, PIDS[ACTOR], None if silent else -9)
    aborted = death(5 if silent else 6, TRAINER, PIDS[TRAINER], None if silent else -6, crash)
    full = f"class_name: AqnTaskRunner\n\tpid: {PIDS[TRAINER]}\n"
    last = end(7, "ActorDiedError", "The actor died unexpectedly before finishing this task.", full)
    assert find_cause(last, [killed, aborted]) == killed
    assert find_cause(last, [aborted]) == aborted


def test_a_death_that_ray_tells_may_be_collected_later():
    """Other processes that die after the end were ended with the run."""
    killed, ended = death(6.4, ACTOR, PIDS[ACTOR], -9), death(6.2, REWARD, PIDS[REWARD], -15)
    full = f"RayTaskError: run() (pid={PIDS[REWARD]}, ip=10.0.0.1)\n\tclass_name: WorkerDict\n\tpid: {PIDS[ACTOR]}\n"
    assert find_cause(end(6, "ActorDiedError", "The actor died unexpectedly …", full), [killed, ended]) == killed


def test_a_death_that_may_be_of_the_end_counts_last():
    late = Fault(**{**death(5, REWARD, PIDS[REWARD], None).__dict__, "late": True})
    gone = fault(5.5, ENGINE, "RuntimeError", "Executor failed.", ends=True)
    last = end(6, "EngineDeadError", DEAD_ENGINE)
    assert find_cause(last, [late]) == late
    assert find_cause(last, [late, death(5.2, WORKER, PIDS[WORKER], None), gone]).process == WORKER
