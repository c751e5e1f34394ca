"""The command line in a process of its own, for tests."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from tests.helpers import warm

MARK = chr(30)
# Several commands in one process, as a shell would start them. Both streams have a mark at the end of each command.
SEVERAL = """
import json, os, sys
from verl_aqn.cli import main as cli
for line in json.loads(os.environ["COMMANDS"]):
    sys.argv = ["verl-aqn", *line]
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code or 0
    print(end=chr(30), flush=True)
    print(chr(30) + str(code), end=chr(30), file=sys.stderr, flush=True)
"""


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    if warmly := warm.run(arguments, {**os.environ, **env}):
        return warmly
    return subprocess.run(
        [sys.executable, "-m", "verl_aqn.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def run_all(*commands: Sequence[str]) -> list[subprocess.CompletedProcess]:
    """Run several commands in one process, which imports torch and other packages only once."""
    env = {**os.environ, "COMMANDS": json.dumps([list(map(str, command)) for command in commands])}
    done = subprocess.run([sys.executable, "-c", SEVERAL], capture_output=True, text=True, env=env, check=False)
    outputs, errors = done.stdout.split(MARK)[:-1], done.stderr.split(MARK)[:-1]
    assert (len(outputs), len(errors)) == (len(commands), 2 * len(commands)), done.stderr
    results = zip(commands, errors[1::2], outputs, errors[::2], strict=True)
    return [subprocess.CompletedProcess(command, int(code), out, err) for command, code, out, err in results]


def one_line(result: subprocess.CompletedProcess, code: int) -> str:
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
