"""Judge responses with math-verify, which reads LaTeX and expressions. Used only in validation, never as the reward.

A model's text can overload a computer algebra system: `9^{9^{9^9}}` uses all time and memory, and math-verify's own
time limit is a signal that big-number arithmetic ignores. So responses are judged in another process (`python -m
verl_aqn.tasks.math_verify`), which imports math-verify and forks. The kernel enforces limits on the fork. A response
that exceeds them ends the fork and is wrong; the next fork continues with the rest. This module is imported everywhere,
but math-verify only in that process.
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

# For one response, which usually takes 1 ms. The limit is on CPU time (the kernel rounds it: 1 to 2 s), so that the
# result does not depend on other load; the wall-clock limit only ends a process that waits forever.
CPU_S, WALL_S = 1, 10
MEMORY_BYTES = 1 << 30  # address space; the process uses 80 MB before it reads anything
START_S = 120
SHARE, PROCESSES = 2048, 8  # the number of responses that justify another process, and the maximum number of processes
READY = b"+"  # the fork sends this when its limits are set and it can judge within them


def check_installed() -> None:
    """Raise EnvironmentFault if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise EnvironmentFault(
            "math-verify is not installed, and validation scores with it: pip install 'math-verify[antlr4_9_3]'"
        )


def scores(texts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return 1.0 for each i where math-verify finds the number `answers[i]` in `texts[i]`, else 0.0.

    A text that needs more than 2 s of CPU time or 1 GiB of memory is wrong. The start takes a second, a typical
    response 1 ms; many responses are divided among processes.

    Raises:
        DataError: an answer is not a number.
        EnvironmentFault: math-verify is not installed or does not run.
    """
    check_installed()
    lines = []
    for text, answer in zip(texts, answers, strict=True):
        value = number(answer)
        if value is None:
            raise DataError(f"math-verify compares with numbers only, but the ground truth is {answer!r}")
        lines.append(json.dumps([text, f"{value:f}"]) + "\n")
    size = max(SHARE, -(-len(lines) // min(PROCESSES, len(os.sched_getaffinity(0)))))
    shares = [lines[at : at + size] for at in range(0, len(lines), size)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        return [mark for marks in pool.map(_judged, shares) for mark in marks]


def _judged(lines: Sequence[str]) -> list[float]:
    """Judge lines of [text, number] in a new process."""
    # This limit is only for a judge that hangs itself: each response has its own limit.
    limit = START_S + len(lines) * (WALL_S + 1)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "verl_aqn.tasks.math_verify"],
            input="".join(lines), capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"math-verify did not judge {len(lines)} responses within {limit} s") from error
    if done.returncode or len(done.stdout) != len(lines):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentFault(f"math-verify does not run on this machine: {reason}")
    return [float(mark) for mark in done.stdout]


def main() -> None:
    """Judge lines of [text, number] from standard input, and write "1" or "0" for each to standard output."""
    import gc
    import logging

    # A process that ignores this signal, as a Ray worker may, passes that on: forks would be gone before waitpid.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    logging.disable()  # math-verify warns that the caller is now responsible for time limits
    # Fill the caches of patterns and grammar before the first fork, so that no fork has to do it.
    for warming in ("#### 72", r"\boxed{72}", r"so $\frac{144}{2}$", "72%", "1 + 71", "72.0"):
        verified(warming, "72")
    gc.freeze()
    cases = [json.loads(line) for line in sys.stdin]
    marks = ""
    while len(marks) < len(cases):
        marks += _in_fork(cases[len(marks) :])
    sys.stdout.write(marks)


def verified(text: str, answer: str) -> bool:
    """Return math-verify's verdict, without any limit. `answer` is a decimal number."""
    import sympy
    from math_verify import parse, verify

    return verify(sympy.Rational(answer), parse(text, parsing_timeout=None), timeout_seconds=None)


def _in_fork(cases: list[tuple[str, str]]) -> str:
    """Judge the first of `cases` in a fork: all of them, or up to the one that exceeds a limit, which is wrong.

    Raises SystemExit, with the reason, if a fork cannot judge at all; otherwise every response would count as wrong.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit(resource.RLIMIT_AS, MEMORY_BYTES)
            _limit(resource.RLIMIT_FSIZE, 0)  # it writes nothing to a disk
            _limit(resource.RLIMIT_CORE, 0)
            if verified("#### 72", "72"):
                os.write(writing, READY)
            _judge(cases, writing)
        finally:
            os._exit(0)
    os.close(writing)
    if not select.select([reading], [], [], START_S)[0] or os.read(reading, 1) != READY:
        sys.exit("a process with its own limits cannot judge; see `ulimit -a`")
    marks = b""
    while len(marks) < len(cases):
        ready, _, _ = select.select([reading], [], [], WALL_S)
        mark = os.read(reading, 1) if ready else b""  # if the fork dies, the pipe closes and nothing is read
        marks += mark or b"0"
        if not mark:
            break
    os.close(reading)
    os.kill(child, signal.SIGKILL)  # until waitpid, this process number belongs to our fork and to no other process
    os.waitpid(child, 0)
    return marks.decode()


def _judge(cases: list[tuple[str, str]], writing: int) -> None:
    for text, answer in cases:
        # The limit counts from the start of the fork, in whole seconds.
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + CPU_S)
        try:
            right = verified(text, answer)
        except Exception:  # out of memory, too deep, or whatever sympy raises for nonsense: no number was found
            right = False
        os.write(writing, b"1" if right else b"0")


def _limit(which: int, most: int) -> None:
    """Set a limit, or keep a smaller one that this process already has: a hard limit can only be lowered."""
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
