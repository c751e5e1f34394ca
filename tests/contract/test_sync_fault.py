"""An adapter that vLLM refuses is told at once, over verl's own sender and receiver; so is a receiver that fails."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("buckets", [1, 3])
def test_a_refused_adapter_is_raised_with_its_text_and_the_sender_goes_on(buckets):
    told = sync(buckets)
    assert "'in_proj' is not supported" in told["said"]
    assert told["sent"] == [buckets]
    assert told["seconds"] < 30  # verl alone would wait for ever


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_receiver_that_failed_ends_the_sync(moment):
    told = sync(1, moment)
    assert told["sent"] == ["the rollout failed"]
    assert told["seconds"] < 10  # verl alone would wait for ever


def sync(*arguments) -> dict:
    command = [sys.executable, "-m", "tests.refused_adapter", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))
