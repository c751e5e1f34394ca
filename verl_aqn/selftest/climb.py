"""Run the rungs: each in a process group of its own, with a time limit. Imports nothing but the standard library."""

import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_aqn.selftest.ending import TOKEN, end, exit_code
from verl_aqn.selftest.rung import DEVICES, FAILED, NOT_RUN, PASSED, Outcome, Rung

POLL_S = 0.1
LEAST_S = 3.0
"""A rung is not begun with less time than this."""
CLOSING_S = 15.0
"""A process that has answered everything has this long to end by itself."""
TAIL_LINES = 25
CHILD = (sys.executable, "-m", "verl_aqn.selftest.child")


@dataclass
class Climb:
    """A climb of `rungs` on `device` ("auto": what the environment rung finds), with all files in `folder`.

    `minutes`: for all rungs together. `command`: starts a child with a request (another one in tests).
    """

    rungs: Sequence[Rung]
    device: str
    folder: Path
    minutes: float = 10.0
    kernels: bool = False
    command: Sequence[str] = CHILD
    begin: Callable[[Rung], None] = lambda rung: None
    told: Callable[[Rung, Outcome], None] = lambda rung, outcome: None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    count: int = 0

    def run(self) -> list[Outcome]:
        """Climb, and return the outcome of every rung in order."""
        for name in ("logs", "work"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._deadline = time.monotonic() + 60 * self.minutes
        pending = list(self.rungs)
        while pending:
            rung = pending[0]
            if reason := self._obstacle(rung):
                self._tell(pending.pop(0), Outcome(rung.name, NOT_RUN, why=reason))
                continue
            together = [rung]
            for other in pending[1:]:
                if not rung.session or other.session != rung.session or self._obstacle(other, together):
                    break
                together.append(other)
            for one in self._process(together):
                pending.remove(one)
        return [self.outcomes[rung.name] for rung in self.rungs]

    def _obstacle(self, rung: Rung, before: Sequence[Rung] = ()) -> str:
        """Return why a rung cannot be run now, or ""; `before`: rungs that will have passed by then."""
        coming = {one.name for one in before}
        if rung.needs and self.device in DEVICES and self.device not in rung.devices:
            return rung.elsewhere
        for need in rung.needs:
            known = self.outcomes.get(need)
            if need not in coming and (known is None or known.status != PASSED):
                return f"needs {need}"
        if rung.needs and self.count < rung.least:
            return f"needs {rung.least} devices, there is {self.count}"
        if self._deadline - time.monotonic() < LEAST_S:
            return f"the {self.minutes:g} minutes were used up: give more with --minutes"
        return ""

    def _process(self, rungs: list[Rung]) -> list[Rung]:
        """Run rungs in one new process until one fails. Return those that have an outcome now."""
        log = self.folder / "logs" / f"{rungs[0].name}.log"
        answers = self.folder / "work" / f"{rungs[0].name}.answers"
        answers.unlink(missing_ok=True)
        with _started(self._request(rungs, answers), self.command, log) as (process, stop):
            since, done = time.monotonic(), list[Rung]()
            for rung in rungs:
                left = self._deadline - time.monotonic()
                limit = min(rung.limit_s * max(self.minutes / 10, 1.0), left)
                self.begin(rung)
                outcome, since = self._await(rung, process, answers, since, limit)
                if outcome is None:  # it neither answered nor ended
                    stop()
                    why = f"no answer within {limit:.0f} s; its processes were ended"
                    outcome = Outcome(rung.name, FAILED, time.monotonic() - since, why=why)
                done.append(rung)
                if outcome.status == FAILED:
                    stop()
                    outcome = _with_tail(outcome, log)
                self._tell(rung, outcome)
                if outcome.status == FAILED:
                    break
            else:
                _wait(process, CLOSING_S)
        return done

    def _await(
        self, rung: Rung, process: subprocess.Popen, answers: Path, since: float, limit_s: float
    ) -> tuple[Outcome | None, float]:
        """Wait for a rung's answer. Return its outcome (None: still running after `limit_s`) and the time now."""
        while True:
            ended = exit_code(process)  # before the answers are read: what it wrote last counts
            for said in _lines(answers):
                if said["rung"] == rung.name and said["event"] == "end":
                    fields = {key: said[key] for key in ("status", "figure", "figures", "why")}
                    now = time.monotonic()
                    return Outcome(rung.name, seconds=now - since, **fields), now
            now = time.monotonic()
            if ended is not None:
                return Outcome(rung.name, FAILED, now - since, why=f"its process {_ended(ended)}"), now
            if now - since > limit_s:
                return None, since
            time.sleep(POLL_S)

    def _tell(self, rung: Rung, outcome: Outcome) -> None:
        if rung.name == "environment" and outcome.status == PASSED:
            self.device, self.count = outcome.figures["device"], outcome.figures["devices"]
        self.outcomes[rung.name] = outcome
        self.told(rung, outcome)

    def _request(self, rungs: list[Rung], answers: Path) -> Path:
        work = self.folder / "work" / (rungs[0].session or rungs[0].name)
        work.mkdir(exist_ok=True)
        request = self.folder / "work" / f"{rungs[0].name}.request.json"
        passed = {name: one.figures for name, one in self.outcomes.items() if one.status == PASSED}
        asked: Mapping[str, Any] = {
            "rungs": [rung.name for rung in rungs], "answers": str(answers), "device": self.device,
            "count": self.count, "folder": str(work), "kernels": self.kernels, "done": passed,
        }  # fmt: skip
        request.write_text(json.dumps(asked), encoding="utf-8")
        return request


@contextmanager
def _started(
    request: Path, command: Sequence[str], log: Path
) -> Iterator[tuple[subprocess.Popen, Callable[[], list[int]]]]:
    """Start a child in its own session; yield it and a function that ends it with all its children. End it at exit."""
    token = secrets.token_hex(16)
    # A short path, because sockets are created below it and their paths are limited to 107 characters.
    temporary = tempfile.mkdtemp(prefix="aqn-", dir="/tmp")
    marks = {TOKEN: token, "TMPDIR": temporary, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, str(request)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | marks,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    def stop() -> list[int]:
        return end(process, token)

    try:
        yield process, stop
    finally:
        stop()
        shutil.rmtree(temporary, ignore_errors=True)


def _end_with_parent() -> None:
    """Make the kernel send SIGTERM to this new child when its parent dies for any reason."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    until = time.monotonic() + seconds
    while exit_code(process) is None and time.monotonic() < until:
        time.sleep(POLL_S)


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the complete JSON lines of a file that another process writes."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code} without an answer"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a signal"
    return f"was ended by {name} ({-code})"


def _with_tail(outcome: Outcome, log: Path) -> Outcome:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Outcome(**vars(outcome) | {"tail": "\n".join(lines[-TAIL_LINES:])})
