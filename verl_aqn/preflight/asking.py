"""Questions to verl and vLLM, each asked in its own process, and answers that are stored for the next run.

Both packages take seconds to import, choose a platform for their process, and run code that is not part of verl-aqn.
A process with these imports can be forked where there is one (`asked_by`).
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from verl_aqn.errors import EnvironmentFault


class RunsModule(Protocol):
    """Run `python ARGUMENTS` in a process that ends within `timeout` seconds, and return what it printed.

    Raises:
        subprocess.TimeoutExpired: it did not end in time.
    """

    def __call__(
        self, arguments: list[str], text: str, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]: ...


def in_new_process(
    arguments: list[str], text: str, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a new process (see `RunsModule`)."""
    return subprocess.run(
        [sys.executable, *arguments], input=text, capture_output=True, text=True, errors="replace", env=environment,
        timeout=timeout, check=False,
    )  # fmt: skip


_runs: ContextVar[RunsModule] = ContextVar("_runs", default=in_new_process)


@contextmanager
def asked_by(runs: RunsModule) -> Iterator[None]:
    """Let `runs` start the processes of all questions inside this context."""
    token = _runs.set(runs)
    try:
        yield
    finally:
        _runs.reset(token)


def version_of(*names: str) -> str | None:
    """Return the version of the first of these packages that is installed, or None if none is."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def ask_module(
    module: str,
    about: str,
    arguments: Sequence[str] = (),
    *,
    timeout: float,
    fits: Callable[[Any], bool],
    text: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Any:
    """Return the JSON in the last line that `python -m MODULE ARGUMENTS` prints.

    Args:
        about: who is asked and what, in words: "vLLM whether it can serve FOLDER".
        timeout: seconds. text: what the module reads from standard input. env: replaces this process's environment.
        fits: return whether an answer has the form that the module prints.

    Raises:
        EnvironmentFault: the process ended without such an answer, or did not end in time.
    """
    who, _, what = about.partition(" ")
    try:
        done = _runs.get()(["-m", module, *arguments], text or "", os.environ if env is None else env, timeout)
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"{who} did not answer within {timeout} s {what}") from None
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if fits(answer):
            return answer
    except (IndexError, ValueError):
        pass
    last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
    raise EnvironmentFault(
        f"{who} could not be asked {what} (exit code {done.returncode}: {last[:300]}): see `python -m {module}`"
    )


def kept(file: Path, fits: Callable[[Any], bool]) -> Any:
    """Return the answer that `keep` wrote to `file`, or None if there is none or `fits` rejects it."""
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return answer if fits(answer) else None


def keep(file: Path, answer: Any) -> None:
    """Write an answer to `file`; if this fails, the question is asked again next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(answer), encoding="utf-8")
    except OSError:
        pass
