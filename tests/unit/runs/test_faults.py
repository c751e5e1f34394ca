"""A process records its own errors: what it logs, and what ends it or a thread, once each and without side effects."""

import json
import logging
import os
import subprocess
import sys

import pytest

from verl_aqn.runs import faults

PROGRAM = """
import logging, sys, threading
from verl_aqn.runs import faults
faults.watch(); faults.watch()
log = logging.getLogger("other.library"); log.propagate = False
def fail(): raise ValueError("first line:\\nsecond line")
try: fail()
except ValueError as error:
    log.error("it failed: %s", error)
    log.exception("again")
    log.warning("only a warning", exc_info=True)
log.error("no exception at all")
try: raise RuntimeError("the engine")
except RuntimeError: log.exception("EngineCore encountered a fatal error.")
thread = threading.Thread(target=lambda: {}["thread"]); thread.start(); thread.join()
def ends(): raise OSError("the end")
ends()
"""


def run(program: str, place: str) -> list[dict]:
    env = {**os.environ, faults.PLACE: place}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert "Logging error" not in done.stderr
    path = os.path.join(os.path.dirname(place), faults.FILE) if place else ""
    return [json.loads(line) for line in open(path)] if path and os.path.exists(path) else []


def test_what_a_process_logs_and_ends_by(tmp_path):
    found = run(PROGRAM, str(tmp_path / faults.FILE))
    assert [(one["type"], one["text"], one["ends"]) for one in found] == [
        ("ValueError", "first line: second line", False),
        ("RuntimeError", "the engine", True),
        ("KeyError", "'thread'", False),
        ("OSError", "the end", True),
    ]
    assert all(one["process"] and one["pid"] and one["time"] and not one["ours"] for one in found)


def test_outside_a_run_and_where_nothing_can_be_written_a_process_goes_on(tmp_path):
    assert run(PROGRAM, "") == []
    assert run(PROGRAM, str(tmp_path / "missing" / faults.FILE)) == []


def test_errors_without_number_are_not_all_written(tmp_path, monkeypatch):
    monkeypatch.setenv(faults.PLACE, str(tmp_path / faults.FILE))
    monkeypatch.setattr(faults, "_noted", 0)
    monkeypatch.setattr(faults, "_since", faults.time.monotonic())
    for number in range(3 * faults.BURST):
        faults.note(ValueError(f"number {number}"))
    faults.note(ValueError("the last"), ends=True)
    lines = (tmp_path / faults.FILE).read_text().splitlines()
    assert faults.BURST < len(lines) < faults.BURST + 10
    assert json.loads(lines[-1])["text"] == "the last"


def test_the_line_is_where_the_user_can_change_something():
    def mine():
        json.loads("{")

    with pytest.raises(json.JSONDecodeError) as caught:
        mine()
    assert faults.place_of(caught.value).startswith("runs/test_faults.py:")


def test_pydantics_first_line_is_a_count_and_not_said():
    pydantic = pytest.importorskip("pydantic")

    class Model(pydantic.BaseModel):
        path: str

    with pytest.raises(pydantic.ValidationError) as caught:
        Model(path=3)
    assert faults.one_line(caught.value) == "path: Input should be a valid string"


def test_what_was_handled_when_an_error_was_raised_is_not_its_text():
    def retry():
        try:
            raise ConnectionError("the first try")
        except ConnectionError:
            raise ValueError("the second try")  # noqa: B904

    with pytest.raises(ValueError, match="second") as caught:
        retry()
    assert "the first try" not in faults.describe(caught.value)["full"]
    caught.value.__cause__ = OSError("said to be the cause")
    assert "said to be the cause" in faults.describe(caught.value)["full"]


def test_the_hooks_of_others_still_run(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(faults, "_watching", False)
    before_a_run = sys.excepthook
    faults.watch()
    assert sys.excepthook is before_a_run, "outside a run nothing is changed"
    monkeypatch.setenv(faults.PLACE, str(tmp_path / faults.FILE))
    before = logging.getLogRecordFactory(), sys.excepthook, faults.threading.excepthook
    try:
        logging.setLogRecordFactory(lambda *args, **named: made.append(1) or logging.LogRecord(*args, **named))
        sys.excepthook = faults.threading.excepthook = lambda *_: made.append(2)
        faults.watch()
        logging.getLogger("any").error("text")
        sys.excepthook(ValueError, ValueError(), None)
        assert made == [1, 2]
    finally:
        logging.setLogRecordFactory(before[0])
        sys.excepthook, faults.threading.excepthook = before[1:]
