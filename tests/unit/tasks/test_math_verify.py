"""math-verify's result for hand-labelled responses; no response can hang it, exhaust memory or use the machine."""

import os
import subprocess
import sys
import time

import pytest

from verl_aqn.errors import DataError, EnvironmentFault
from verl_aqn.tasks import math_verify
from verl_aqn.tasks.gsm8k import number
from verl_aqn.tasks.math_verify import WALL_S, scores

# text, ground truth, right by math-verify (0.9.0)
LABELLED = [
    ("3 + 4 = 7\n#### 7", "7", 1),
    ("#### 72.", "72", 1),
    ("#### 72.0", "72", 1),
    ("#### 072", "72", 1),
    ("#### .5", "0.5", 1),
    ("#### 5", "0.5", 0),
    ("#### 1,234", "1234", 1),
    ("#### 1234", "1,234", 1),
    ("#### 1,2", "12", 0),
    ("#### $1,200.50", "1200.5", 1),
    ("#### $-5", "-5", 1),
    ("#### -3", "-3", 1),
    ("#### 3", "-3", 0),
    ("#### 72kg", "72", 1),
    ("#### 72 clips", "72", 1),
    ("#### 5\nNo, wait.\n#### 7", "7", 1),
    # Responses that a rule with markers or last numbers cannot read.
    ("\\boxed{72}", "72", 1),
    ("#### \\boxed{72}", "72", 1),
    ("The answer is $\\boxed{72}$.", "72", 1),
    ("\\boxed{72\\text{ clips}}", "72", 1),
    ("\\boxed{72 \\text{ km/h}}", "72", 1),
    ("\\boxed{\\$72}", "72", 1),
    ("\\boxed{1,234}", "1234", 1),
    ("$1{,}234$", "1234", 1),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1),
    ("\\boxed{\\dfrac12}", "0.5", 1),
    ("$\\frac{144}{2}$", "72", 1),
    ("#### 144/2", "72", 1),
    ("#### 72/2", "72", 0),
    ("\\boxed{6 \\times 12}", "72", 1),
    ("\\boxed{7.2 \\times 10^1}", "72", 1),
    ("\\boxed{x = 72}", "72", 1),
    ("\\boxed{71, 72}", "72", 0),
    ("\\boxed{72.001}", "72", 0),
    ("\\boxed{72}, or rather #### 71", "72", 1),  # a box has priority over everything
    ("#### **72**", "72", 1),
    ("### 72", "72", 1),
    ("#### 72 = 3 * 24", "72", 1),
    ("The answer is 72. It took 2 steps", "72", 1),
    # Cases in which its result is not the desired one.
    ("#### 72 clips in 3 days", "72", 0),  # the last number
    ("#### 72 clips in 3 days", "3", 1),
    ("#### 50%", "50", 1),  # both
    ("#### 50%", "0.5", 1),
    ("\\boxed{50\\%}", "50", 0),  # neither
    ("\\boxed{50\\%}", "0.5", 0),
    ("#### -$5", "-5", 0),
    ("#### \N{MINUS SIGN}3", "-3", 0),
    ("\\boxed{71}, no: \\boxed{72}", "72", 0),
    ("####72", "72", 0),
    ("#### 7:30", "7", 1),
    ("#### seventy-two", "72", 0),
    ("#### NaN", "72", 0),
    ("", "72", 0),
]


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], float]:
    texts, answers, _ = zip(*LABELLED, strict=True)
    return dict(zip(zip(texts, answers, strict=True), scores(texts, answers), strict=True))


@pytest.mark.parametrize(("text", "truth", "right"), LABELLED)
def test_labelled_answers(found, text, truth, right):
    assert found[text, truth] == right


def test_many_answers_are_shared_out_and_keep_their_order(monkeypatch):
    texts, answers = [f"#### {n}" for n in range(7)], ["0", "1", "0", "3", "4", "0", "6"]
    started, begin = [], subprocess.run
    monkeypatch.setattr(math_verify, "SHARE", 2)
    monkeypatch.setattr(math_verify, "PROCESSES", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    monkeypatch.setattr(subprocess, "run", lambda *args, **named: started.append(args) or begin(*args, **named))
    assert math_verify.scores(texts, answers) == [1, 1, 0, 1, 1, 0, 1]
    assert len(started) == 4
    assert math_verify.scores([], []) == []


def test_hostile_texts_are_wrong_within_a_bound_and_the_rest_is_judged(tmp_path):
    touched = tmp_path / "touched"
    texts = [
        "$9^{9^{9^9}}$",
        "#### 9**9**9**9**9",
        "$$\\prod_{n=1}^{10^9} n$$",
        "x" * 1_000_000,
        "1 " * 500_000,
        "#### " + "7" * 100_000,
        "\\frac{" * 5_000 + "72",
        "$" + "(" * 5_000 + "71" + ")" * 5_000 + "$",
        f"#### __import__('os').system('touch {touched}')",
        f"$__import__('pathlib').Path('{touched}').touch()$",
        "\x00\ud800\n\r\u2028",
    ]
    began = time.monotonic()
    found = scores(["#### 72", *texts, "#### 72"], ["72"] * (len(texts) + 2))
    assert found == [1.0, *[0.0] * len(texts), 1.0]
    assert not touched.exists()
    # The limit is on wall time; alone it takes 8 s, but a busy machine needs more.
    assert time.monotonic() - began < 30 + WALL_S * len(texts)


def test_a_text_that_only_waits_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(math_verify, "WALL_S", 0.5)
    monkeypatch.setattr(math_verify, "_judge", lambda cases, writing: time.sleep(60))
    began = time.monotonic()
    assert math_verify._in_fork([("#### 72", "72"), ("#### 72", "72")]) == "0"
    assert time.monotonic() - began < 20


def test_only_the_answer_that_ends_a_fork_is_wrong_and_memory_is_bounded(monkeypatch):
    def greedy(text, answer):
        return text in ("right", "#### 72") or bool(bytearray(3 << 30)) or True

    monkeypatch.setattr(math_verify, "verified", greedy)
    assert math_verify._in_fork([("right", "1"), ("greedy", "1"), ("right", "1")]) == "101"


def test_a_judge_that_can_find_nothing_right_says_so_instead_of_wrong(monkeypatch):
    monkeypatch.setattr(math_verify, "verified", lambda text, answer: bytearray(2 * math_verify.MEMORY_BYTES))
    with pytest.raises(SystemExit, match="cannot judge"):
        math_verify._in_fork([("#### 72", "72")])


def test_nothing_to_judge():
    assert scores([], []) == []


def test_a_truth_that_is_no_number_is_an_error():
    with pytest.raises(DataError, match="'seven'"):
        scores(["#### 7"], ["seven"])
    assert [number(text) for text in ("1 or 2", "\\frac{1}{2}", "72 clips", "")] == [None] * 4
    assert [str(number(text)) for text in ("1,234.50", " -3 ", "$5")] == ["1234.50", "-3", "5"]


def test_without_math_verify_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(math_verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="pip install 'math-verify"):
        scores(["#### 7"], ["7"])


def test_a_judge_that_dies_is_an_error_with_its_last_words(monkeypatch):
    monkeypatch.setattr(math_verify.sys, "executable", "/bin/false")
    with pytest.raises(EnvironmentFault, match="does not run on this machine: exit code 1"):
        scores(["#### 7"], ["7"])


@pytest.mark.parametrize(
    "before",
    [
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",  # ignores its children, as a Ray worker may
        "import resource as r; r.setrlimit(r.RLIMIT_CPU, (3600, 3600)); r.setrlimit(r.RLIMIT_CORE, (0, 0))",
    ],
)
def test_whatever_it_is_called_from_the_judge_judges(before):
    code = (
        f"{before}\n"
        "from verl_aqn.tasks.math_verify import scores\n"
        "print(scores(['#### 7', '#### 9**9**9**9', '#### 7'], ['7'] * 3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1.0, 0.0, 1.0]\n"


def test_this_process_never_imports_it():
    code = "import sys, verl_aqn.tasks.math_verify as m; m.scores(['#### 7'], ['7']); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
