"""A third opinion on answers: math-verify, which reads LaTeX and expressions. Only for validation, never the reward.

What a model writes is hostile to a computer algebra system: `9^{9^{9^9}}` takes all time and memory there is, and
math-verify's own time limit is a signal that big-number arithmetic does not look at. So answers are judged in another
process (`python -m verl_aqn.tasks.math_verify`), which imports math-verify and forks. The fork has limits that the
kernel keeps; an answer that goes beyond them ends it, is wrong, and the next fork goes on with the rest. This module is
imported everywhere; math-verify only in that process.
"""

import importlib.util
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from verl_aqn.errors import DataError, EnvironmentFault
from verl_aqn.tasks.gsm8k import number

# Of one answer, which takes 1 ms as a rule. Computing time (the kernel rounds it: 1 to 2 s), so that a busy machine
# judges alike; the clock only ends what waits for ever.
CPU_S, WALL_S = 1, 10
MEMORY_BYTES = 1 << 30  # address space; the process has 80 MB before it reads anything
START_S = 120
SHARE, PROCESSES = 2048, 8  # answers that are worth a process, and how many there are at most
READY = b"+"  # a fork's word that its limits stand and it can judge within them


def check_installed() -> None:
    """EnvironmentFault where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise EnvironmentFault(
            "math-verify is not installed, and validation scores with it: pip install 'math-verify[antlr4_9_3]'"
        )


def scores(texts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1.0 where math-verify finds the number `answers[i]` in `texts[i]`, else 0.0.

    A text that takes more than 2 s of computing or 1 GiB of memory is wrong. The start takes a second, an ordinary
    answer 1 ms; many answers are shared out among processes.

    Raises:
        DataError: an answer is not a number.
        EnvironmentFault: math-verify is not installed or does not run.
    """
    check_installed()
    lines = []
    for text, answer in zip(texts, answers, strict=True):
        value = number(answer)
        if value is None:
            raise DataError(f"math-verify is given numbers to compare with, but the ground truth is {answer!r}")
        lines.append(json.dumps([text, f"{value:f}"]) + "\n")
    size = max(SHARE, -(-len(lines) // min(PROCESSES, len(os.sched_getaffinity(0)))))
    shares = [lines[at : at + size] for at in range(0, len(lines), size)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        return [mark for marks in pool.map(_judged, shares) for mark in marks]


def _judged(lines: Sequence[str]) -> list[float]:
    """Verdicts on lines of [text, number], from a process of their own."""
    # The limit here is only for a judge that hangs itself: each answer has its own.
    limit = START_S + len(lines) * (WALL_S + 1)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "verl_aqn.tasks.math_verify"],
            input="".join(lines), capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"math-verify has not judged {len(lines)} answers in {limit} s") from error
    if done.returncode or len(done.stdout) != len(lines):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentFault(f"math-verify does not run here: {reason}")
    return [float(mark) for mark in done.stdout]


def main() -> None:
    """Judge lines of [text, number] from standard input: a "1" or a "0" each to standard output."""
    import gc
    import logging

    # A process that ignores it, as a Ray worker may, hands that on: forks would be gone before they are waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    logging.disable()  # its warning that time limits are now somebody else's business
    # Fill the caches of patterns and grammar before the first fork, so that no fork has to.
    for warming in ("#### 72", r"\boxed{72}", r"so $\frac{144}{2}$", "72%", "1 + 71", "72.0"):
        verified(warming, "72")
    gc.freeze()
    cases = [json.loads(line) for line in sys.stdin]
    marks = ""
    while len(marks) < len(cases):
        marks += _in_fork(cases[len(marks) :])
    sys.stdout.write(marks)


def verified(text: str, answer: str) -> bool:
    """math-verify's verdict, without any limit. `answer` is a decimal number."""
    import sympy
    from math_verify import parse, verify

    return verify(sympy.Rational(answer), parse(text, parsing_timeout=None), timeout_seconds=None)


def _in_fork(cases: list[tuple[str, str]]) -> str:
    """Verdicts on the first of `cases`: all, or up to the one at which a limit ended the fork, which is wrong.

    A fork that cannot judge at all would find every answer wrong: SystemExit, with the reason.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit(resource.RLIMIT_AS, MEMORY_BYTES)
            _limit(resource.RLIMIT_FSIZE, 0)  # it has nothing to write to a disk
            _limit(resource.RLIMIT_CORE, 0)
            if verified("#### 72", "72"):
                os.write(writing, READY)
            _judge(cases, writing)
        finally:
            os._exit(0)
    os.close(writing)
    if not select.select([reading], [], [], START_S)[0] or os.read(reading, 1) != READY:
        sys.exit("a process with limits of its own cannot judge; see `ulimit -a`")
    marks = b""
    while len(marks) < len(cases):
        ready, _, _ = select.select([reading], [], [], WALL_S)
        mark = os.read(reading, 1) if ready else b""  # the fork's death closes the pipe: nothing is read
        marks += mark or b"0"
        if not mark:
            break
    os.close(reading)
    os.kill(child, signal.SIGKILL)  # ours until it is waited for, so the number is no other process's
    os.waitpid(child, 0)
    return marks.decode()


def _judge(cases: list[tuple[str, str]], writing: int) -> None:
    for text, answer in cases:
        # Counted from the fork's start, in whole seconds.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + CPU_S)
        try:
            right = verified(text, answer)
        except Exception:  # out of memory, too deep, or what sympy makes of nonsense: it has found no number
            right = False
        os.write(writing, b"1" if right else b"0")


def _limit(which: int, most: int) -> None:
    """At most so much, or what this process was given if that is less: a hard limit can only be lowered."""
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
