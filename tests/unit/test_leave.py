"""`leave` ends a process as `sys.exit` does, but for the time that Python takes to clean up."""

import subprocess
import sys

import pytest

BEFORE = """
import atexit, sys, threading, time
from verl_aqn.environment import leave
atexit.register(lambda: print("last", end="."))
def late():
    time.sleep(0.2)
    print("late", end=".")
threading.Thread(target=late).start()
print("first", end=".")
print("to the other stream", end="", file=sys.stderr)
"""


@pytest.mark.parametrize("code", ["None", "0", "3", "256 + 4", "-1", "'no such file'", "[]", "True"])
def test_code_output_threads_and_handlers_are_those_of_sys_exit(code):
    ended = [
        subprocess.run([sys.executable, "-c", f"{BEFORE}{end}({code})"], capture_output=True, text=True, check=False)
        for end in ("sys.exit", "leave")
    ]
    (pythons, ours) = ((one.returncode, one.stdout, one.stderr) for one in ended)
    assert ours == pythons
    assert ours[1] == "first.late.last."


def test_nobody_reads_the_output_any_more():
    code = f"{BEFORE}import os; read, write = os.pipe(); os.dup2(write, 1); os.close(read); os.close(write); leave(7)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 7
