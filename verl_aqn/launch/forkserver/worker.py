"""A replacement for Ray's `setup_worker.py` that does not import Ray, which takes half a second for each worker.

The raylet runs `python worker.py [OPTIONS] default_worker.py ARGUMENTS…` for each worker of the run's own Ray. The two
options with the context of the runtime environment are somewhere among the arguments. What this program does not know,
it leaves to Ray's own program.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
KNOWN = {"command_prefix", "env_vars", "py_executable", "override_worker_entrypoint", "java_jars"}


def command(arguments: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """Return the command of the worker and its own environment variables; None if this is left to Ray's program."""
    told = [one.removeprefix(CONTEXT) for one in arguments if one.startswith(CONTEXT)]
    if len(told) != 1 or [one for one in arguments if one.startswith(LANGUAGE)] != [f"{LANGUAGE}PYTHON"]:
        return None
    context: dict[str, Any] = json.loads(told[0])
    if set(context) != KNOWN or context["command_prefix"] or context["override_worker_entrypoint"]:
        return None
    python = context["py_executable"]
    if not os.access(python, os.X_OK):  # Ray gives it to a shell, which also takes a command with arguments
        return None
    rest = [one for one in arguments if not one.startswith((CONTEXT, LANGUAGE))]
    return [python, *rest], context["env_vars"]


def add_variables(variables: Mapping[str, str]) -> None:
    """Set environment variables one after another. Replace the $NAME in a value; a ${NAME} that is not set is empty."""
    for name, value in variables.items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))


def main(arguments: list[str]) -> None:
    """Become the worker, or Ray's own program for it."""
    if (found := command(arguments)) is None:
        ray = find_spec("ray")  # imports nothing
        assert ray
        assert ray.origin
        rays = Path(ray.origin).with_name("_private") / "workers/setup_worker.py"
        os.execv(sys.executable, [sys.executable, str(rays), *arguments])
    words, variables = found
    add_variables(variables)
    os.execv(words[0], words)


if __name__ == "__main__":
    main(sys.argv[1:])
