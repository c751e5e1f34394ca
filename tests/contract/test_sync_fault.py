"""An adapter that vLLM refuses is told at once, over verl's own sender and receiver."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("buckets", [1, 3])
def test_a_refused_adapter_is_raised_with_its_text_and_the_sender_goes_on(buckets):
    command = [sys.executable, "-m", "tests.refused_adapter", str(buckets)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    told = json.loads(lines[0].removeprefix("RESULT "))
    assert "'in_proj' is not supported" in told["said"]
    assert told["sent"] == [buckets]
    assert told["seconds"] < 30  # verl alone would wait for ever
