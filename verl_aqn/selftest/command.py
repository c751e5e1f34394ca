"""The command: climb, tell what happens, write the page. Imports nothing but the standard library."""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_aqn.errors import ConfigError, is_full, reason
from verl_aqn.selftest.climb import CHILD, Climb
from verl_aqn.selftest.ladder import chosen
from verl_aqn.selftest.rung import DEVICES, FAILED, Outcome, Rung
from verl_aqn.selftest.scrub import owner
from verl_aqn.selftest.selftest_page import document, write


def selftest(
    device: str = "auto",
    minutes: float = 10.0,
    output: Path | None = None,
    kernels: bool = False,
    as_json: bool = False,
    command: Sequence[str] = CHILD,
) -> int:
    """Climb the ladder, write the page and the JSON file into `output`, and return the exit code: 1 if a rung failed.

    Raises:
        ConfigError: an unknown device, no time, or a folder that has something in it.
    """
    if device not in ("auto", *DEVICES):
        raise ConfigError(f"--device {device} is not one of {', '.join(DEVICES)}")
    if not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes {minutes:g} is not a number above 0")
    folder = _folder(output)
    rungs, began = chosen(kernels), time.monotonic()
    lines = _Lines(len(rungs))
    climb = Climb(
        rungs, device, folder, minutes=minutes, kernels=kernels, command=command, begin=lines.begin, told=lines.told
    )
    outcomes = climb.run()
    found = document(rungs, outcomes, climb.device, time.monotonic() - began, owner())
    page, data = write(folder, found)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print(found, page, data)
    return int(any(one.status == FAILED for one in outcomes))


def _folder(output: Path | None) -> Path:
    folder = (output or Path(time.strftime("selftest-%Y%m%d-%H%M%S"))).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"-o {output}: there is something in this folder: name a new one")
    except OSError as error:
        todo = "choose a folder on another disk" if is_full(error) else "choose another folder"
        raise ConfigError(f"-o {folder}: {reason(error)}: {todo}") from error
    return folder


class _Lines:
    """Prints a line on standard error when a rung begins (on a terminal) and when it ends."""

    def __init__(self, total: int) -> None:
        self.number, self.total, self.live = 0, total, sys.stderr.isatty()

    def begin(self, rung: Rung) -> None:
        if self.live:
            print(f"\r{self.number + 1:2d}/{self.total} {rung.name} …", end="\x1b[K", file=sys.stderr, flush=True)

    def told(self, rung: Rung, outcome: Outcome) -> None:
        self.number += 1
        text = outcome.figure or outcome.why
        start = "\r\x1b[K" if self.live else ""
        line = f"{self.number:2d}/{self.total} {rung.name:15s} {outcome.status:8s}{outcome.seconds:5.0f} s  {text}"
        print(start + line, file=sys.stderr, flush=True)


def _print(found: dict[str, Any], page: Path, data: Path) -> None:
    counts = ", ".join(f"{found[key]} {key.replace('_', ' ')}" for key in ("passed", "failed", "not_run"))
    print(f"{found['device']}: {counts} in {found['seconds']:.0f} s")
    for row in found["rungs"]:
        if row["status"] == FAILED:
            print(f"failed: {row['name']}: {row['why']}")
    print(f"attach both to an issue: {page} {data}")
