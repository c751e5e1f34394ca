"""Questions to a host in a separate process: an invalid reply is an error, and only valid replies are cached."""

import os

import pytest

from verl_aqn.errors import EnvironmentFault
from verl_aqn.preflight.asking import ask_module, keep, kept, version_of


def fits(answer) -> bool:
    return isinstance(answer, dict) and "good" in answer


@pytest.fixture
def ask(tmp_path):
    """`ask(code)` → the reply of a module with this code; `timeout` in seconds."""

    def ask(code: str, *arguments: str, timeout: float = 60, text: str | None = None):
        (tmp_path / "host.py").write_text(code)
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        return ask_module("host", "host what it says", arguments, timeout=timeout, fits=fits, text=text, env=env)

    return ask


def test_the_last_line_is_the_answer(ask):
    code = 'import sys; print("noise"); print(\'{"good": "%s %s"}\' % (sys.argv[1], sys.stdin.read()))'
    assert ask(code, "argument", text="input") == {"good": "argument input"}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", "exit code 0: it printed nothing"),
        ("print('no JSON')", "exit code 0: it printed nothing"),
        ("print('{\"other\": 1}')", "exit code 0: it printed nothing"),
        ("print('[]')", "exit code 0: it printed nothing"),
        ("raise SystemExit('out of luck')", "exit code 1: out of luck"),
    ],
)
def test_what_is_no_answer_is_a_fault_in_one_line(ask, code, words):
    with pytest.raises(EnvironmentFault, match=r"^host could not be asked what it says \(") as error:
        ask(code)
    assert words in str(error.value)
    assert str(error.value).endswith("see `python -m host`")
    assert "\n" not in str(error.value)


def test_an_answer_that_does_not_come_is_a_fault(ask):
    with pytest.raises(EnvironmentFault, match=r"^host did not answer within 0\.5 s what it says$"):
        ask("import time; time.sleep(60)", timeout=0.5)


def test_answers_are_kept_where_they_fit(tmp_path):
    file = tmp_path / "made" / "answer.json"
    assert kept(file, fits) is None
    keep(file, {"good": 1})
    assert kept(file, fits) == {"good": 1}
    for other in ('{"bad": 1}', "[1]", "half {"):
        file.write_text(other)
        assert kept(file, fits) is None
    (tmp_path / "file").write_text("")
    keep(tmp_path / "file" / "answer.json", {"good": 1})  # the cache is not writable, so the host is asked again


def test_the_first_package_that_is_installed_counts():
    assert version_of("no-such-package", "pytest") == pytest.__version__
    assert version_of("no-such-package") is None
