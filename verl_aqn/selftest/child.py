"""`python -m verl_aqn.selftest.child REQUEST`: run rungs in this process, one after another, until one fails.

REQUEST is a JSON file: `rungs`, the `Context` (`device`, `count`, `folder`, `kernels`, `done`), and `answers`, the file
to which this process appends a JSON line when a rung begins and when it ends.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from verl_aqn.selftest.ladder import RUNGS
from verl_aqn.selftest.rung import FAILED, NOT_RUN, PASSED, Broken, Context, NotApplicable, Reading


def main(request: Path) -> None:
    """Run the rungs of the request and end the process at once, whatever threads and engines are left."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    answers, names = Path(asked.pop("answers")), asked.pop("rungs")
    context = Context(**asked | {"folder": Path(asked["folder"])})
    wanted = {rung.name: rung for rung in RUNGS}

    def tell(**said: Any) -> None:
        with answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")

    for name in names:
        print(f"--- {name}", flush=True)
        tell(rung=name, event="begin")
        said = answer(wanted[name].does, context)
        tell(rung=name, event="end", **said)
        if said["status"] == FAILED:
            break
        context.done[name] = said["figures"]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def answer(does: str, context: Context) -> dict[str, Any]:
    """Run one rung and return its status, seconds, figures and reason."""
    began, why, reading = time.monotonic(), "", Reading("")
    try:
        reading, status = function(does)(context), PASSED
    except NotApplicable as fault:
        status, why = NOT_RUN, str(fault)
    except Broken as fault:
        status, why = FAILED, str(fault)
    except BaseException as error:  # also SystemExit, with which verl and vLLM end processes
        traceback.print_exc()
        text = (str(error).strip() or "no message").splitlines()[0]
        status, why = FAILED, f"{type(error).__name__}: {text}"
    return {
        "status": status, "seconds": time.monotonic() - began, "why": why,
        "figure": reading.figure, "figures": reading.figures,
    }  # fmt: skip


def function(does: str) -> Callable[[Context], Reading]:
    """Return the function that `Rung.does` names."""
    module, _, name = does.partition(".")
    return getattr(import_module(f"verl_aqn.selftest.{module}"), name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
