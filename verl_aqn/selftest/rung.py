"""What a rung is, what it returns, and what it gets. Imports nothing but the standard library."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACCELERATORS = ("cuda", "npu")
DEVICES = ("cpu", *ACCELERATORS)
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class Broken(Exception):
    """A rung found that its subject does not do what it should. The message has the figures."""


class NotApplicable(Exception):
    """A rung cannot say anything on this machine. The message says why."""


@dataclass(frozen=True)
class Rung:
    """One check of the ladder.

    `does`: "MODULE.FUNCTION" in this package; the function gets a `Context` and returns a `Reading`, or raises.
    `proves`: what is true if it passes. `send`: what helps if it fails, beside the page. `needs`: names of rungs that
    must pass first. `limit_s`: seconds for a run of ten minutes; a longer run has proportionally more. `least`: devices
    that must be there. `session`: rungs of one session that follow each other share a process for as long as they pass.
    `kernels`: whether the rung is part of `--kernels-only`.
    """

    name: str
    does: str
    proves: str
    send: str
    needs: tuple[str, ...] = ("environment",)
    limit_s: int = 60
    devices: tuple[str, ...] = DEVICES
    elsewhere: str = ""
    """Why the rung is not run on other devices than `devices`."""
    least: int = 1
    session: str = ""
    kernels: bool = False


@dataclass(frozen=True)
class Reading:
    """The result of a rung that passed: `figure` for people, `figures` for programs."""

    figure: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a rung gets.

    `device`: "auto" only for the environment rung. `count`: devices of this kind. `folder`: for the rung's files.
    `done`: figures of the rungs that passed before. `shared`: objects of the session's earlier rungs. `kernels`: only
    torch may be imported.
    """

    device: str
    count: int
    folder: Path
    kernels: bool = False
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a rung ended: `status`, the reading if it passed, else `why`. `tail`: the end of its log if it failed."""

    name: str
    status: str
    seconds: float = 0.0
    figure: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    tail: str = ""
