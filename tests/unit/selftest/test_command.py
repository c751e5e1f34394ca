"""`verl-aqn selftest` as a user types it: what is refused, what is printed, and the exit code."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.command import one_line, run
from verl_aqn.errors import ConfigError
from verl_aqn.selftest import command
from verl_aqn.selftest.rung import Rung

CHILD = (sys.executable, str(Path(__file__).parents[2] / "helpers" / "selftest_child.py"))


def ladder(monkeypatch, *names: str) -> None:
    rungs = [Rung("environment", "", "p", "s", needs=())]
    rungs += [Rung(name, "", "p", "s") for name in names]
    monkeypatch.setattr(command, "chosen", lambda kernels: tuple(rungs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "tpu"), "error: --device tpu is not one of cpu, cuda, npu"),
        (("--minutes", "0"), "error: --minutes 0 is not a number above 0"),
        (("--minutes", "nan"), "error: --minutes nan is not a number above 0"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, options, message):
    assert one_line(run("selftest", *options, "-o", str(tmp_path / "out")), 2) == message
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="there is something in this folder: name a new one"):
        command.selftest(output=tmp_path)
    with pytest.raises(ConfigError, match="choose another folder"):
        command.selftest(output=tmp_path / "file")


def test_everything_passed(monkeypatch, tmp_path, capsys):
    ladder(monkeypatch, "a", "skip")
    assert command.selftest(output=tmp_path / "out", command=CHILD) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0].startswith("cpu: 2 passed, 0 failed, 1 not run in ")
    assert (
        told.out.splitlines()[1] == f"attach both to an issue: {tmp_path}/out/selftest.md {tmp_path}/out/selftest.json"
    )
    assert [line.split()[:3] for line in told.err.splitlines()] == [
        ["1/3", "environment", "passed"], ["2/3", "a", "passed"], ["3/3", "skip", "not"]
    ]  # fmt: skip


def test_a_failure_is_exit_code_1_and_json_is_one_document(monkeypatch, tmp_path, capsys):
    ladder(monkeypatch, "fail")
    assert command.selftest(output=tmp_path / "out", command=CHILD, as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["failed"], found["not_run"]) == (1, 1, 0)
    assert found["rungs"][1]["send"] == "s"


def test_without_an_environment_nothing_else_is_run(monkeypatch, tmp_path):
    rungs = (Rung("fail", "", "p", "s", needs=()), Rung("a", "", "p", "s", needs=("fail",)))
    monkeypatch.setattr(command, "chosen", lambda kernels: rungs)
    assert command.selftest(device="npu", output=tmp_path / "out", command=CHILD) == 1
    found = json.loads((tmp_path / "out" / "selftest.json").read_text())
    assert (found["device"], found["rungs"][1]["why"]) == ("npu", "needs fail")
