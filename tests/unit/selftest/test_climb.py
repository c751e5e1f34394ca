"""A rung that fails, crashes or hangs is a failed rung and nothing more, and nothing of it stays."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from verl_aqn.selftest.climb import Climb
from verl_aqn.selftest.ending import TOKEN, end
from verl_aqn.selftest.ladder import RUNGS, chosen
from verl_aqn.selftest.rung import FAILED, NOT_RUN, PASSED, Rung

CHILD = (sys.executable, str(Path(__file__).parents[2] / "helpers" / "selftest_child.py"))


def rung(name: str, *needs: str, **more) -> Rung:
    return Rung(name, "", "", "", needs=needs or ("environment",), **{"limit_s": 60, **more})


def climb(folder: Path, *rungs: Rung, minutes: float = 10.0) -> tuple[dict, Climb]:
    first = Rung("environment", "", "", "", needs=())
    made = Climb((first, *rungs), "auto", folder, minutes=minutes, command=CHILD)
    return {one.name: one for one in made.run()}, made


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_rung_that_fails_stops_only_those_that_need_it(tmp_path):
    found, made = climb(tmp_path, rung("fail"), rung("a", "fail"), rung("b", "a"), rung("c"))
    assert [found[name].status for name in ("fail", "a", "b", "c")] == [FAILED, NOT_RUN, NOT_RUN, PASSED]
    assert (found["a"].why, found["b"].why) == ("needs fail", "needs a")
    assert (made.device, made.count) == ("cpu", 1)


@pytest.mark.parametrize(
    ("name", "why"),
    [("crash", "its process was ended by SIGSEGV (11)"), ("exit", "its process exited with code 3 without an answer")],
)
def test_a_process_that_dies_is_a_failed_rung_with_the_end_of_its_log(tmp_path, name, why):
    found, _ = climb(tmp_path, rung(name), rung("after"))
    assert (found[name].status, found[name].why, found["after"].status) == (FAILED, why, PASSED)
    assert f"the log of {name}" in found[name].tail


def test_a_hang_ends_at_its_limit_with_all_its_children(tmp_path, monkeypatch):
    """Children of the same group, of their own session, and those whose parent has died."""
    monkeypatch.setitem(end.__kwdefaults__, "grace_s", 1.0)
    began = time.monotonic()
    found, _ = climb(tmp_path, rung("hang", limit_s=4), rung("after"))
    assert found["hang"].status == FAILED
    assert found["hang"].why == "no answer within 4 s; its processes were ended"
    assert found["after"].status == PASSED
    assert time.monotonic() - began < 30
    work = tmp_path / "work" / "hang"
    children = [int(pid) for pid in (work / "children").read_text().split()]
    assert len(children) == 3
    assert all(gone(pid) for pid in (*children, int((work / "pid-hang").read_text())))


def test_a_process_that_the_ladder_did_not_start_is_left_alone(tmp_path):
    with psutil.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={TOKEN: "another"}) as other:
        climb(tmp_path, rung("crash"))
        assert other.is_running()
        other.kill()


def test_rungs_of_a_session_share_a_process_while_they_pass(tmp_path):
    rungs = [rung(name, session="s") for name in ("a", "skip", "b", "fail", "c", "d")]
    found, _ = climb(tmp_path, *rungs)
    pids = {name: found[name].figures.get("pid") for name in ("a", "b", "c", "d")}
    assert pids["a"] == pids["b"]
    assert pids["c"] == pids["d"]
    assert pids["a"] != pids["c"], "after a failure the next rung begins anew"
    assert [one.status for one in found.values()] == [PASSED, PASSED, NOT_RUN, PASSED, FAILED, PASSED, PASSED]


def test_a_crash_within_a_session_leaves_the_answers_before_it(tmp_path):
    found, _ = climb(tmp_path, *[rung(name, session="s") for name in ("a", "crash", "b")])
    assert [found[name].status for name in ("a", "crash", "b")] == [PASSED, FAILED, PASSED]


def test_a_rung_of_a_session_that_needs_a_failed_one_is_not_run(tmp_path):
    found, _ = climb(tmp_path, rung("fail", session="s"), rung("a", "fail", session="s"), rung("b", session="s"))
    assert (found["a"].why, found["b"].status) == ("needs fail", PASSED)


def test_rungs_without_their_device_say_why_they_are_not_run(tmp_path):
    other = rung("graphs", devices=("cuda", "npu"), elsewhere="there are no graphs on a CPU")
    found, _ = climb(tmp_path, other, rung("pair", least=2), rung("after", "graphs"))
    assert (found["graphs"].status, found["graphs"].why) == (NOT_RUN, "there are no graphs on a CPU")
    assert (found["pair"].status, found["pair"].why) == (NOT_RUN, "needs 2 devices, there is 1")
    assert found["after"].why == "needs graphs"


def test_the_time_of_all_rungs_together_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setitem(end.__kwdefaults__, "grace_s", 1.0)
    found, _ = climb(tmp_path, rung("hang"), rung("after"), minutes=0.15)
    assert found["hang"].status == FAILED
    assert found["after"].why == "the 0.15 minutes were used up: give more with --minutes"


def test_every_rung_names_a_function_and_needs_rungs_before_it():
    before: set[str] = set()
    for one in RUNGS:
        assert set(one.needs) <= before, one.name
        assert one.proves
        assert one.send
        assert one.elsewhere or len(one.devices) == 3
        module, _, name = one.does.partition(".")
        text = (Path(__file__).parents[3] / "verl_aqn" / "selftest" / f"{module}.py").read_text()
        assert f"def {name}(context: Context) -> Reading:" in text
        before.add(one.name)
    assert len(before) == len(RUNGS)


def test_kernels_only_is_the_rungs_that_need_torch_alone():
    assert [one.name for one in chosen(True)] == ["environment", "codec-bits", "codec-speed", "packed-linear"]
    assert all(set(one.needs) <= {other.name for other in chosen(True)} for one in chosen(True))
