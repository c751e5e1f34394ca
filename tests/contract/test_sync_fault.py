"""An adapter that vLLM refuses is told at once, over verl's own sender and receiver; so is a receiver that fails."""

import inspect
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
    assert told["noted"] == 1  # the memory that it was sent through, which a kill would leave behind


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_receiver_that_failed_ends_the_sync(moment):
    told = sync(1, moment)
    assert told["sent"] == ["the rollout failed"]
    assert told["seconds"] < 10  # verl alone would wait for ever


def test_verl_s_adapter_sends_by_what_we_put_there():
    """Its sender by the name in its module, after it has asked the server by a method that we see."""
    from verl.workers.rollout.vllm_rollout import vllm_rollout
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    update = inspect.getsource(vllm_rollout.ServerAdapter.update_weights)
    assert "sender = BucketedWeightSender(" in update
    assert '_execute_method(\n            "update_weights_from_ipc",\n            non_block=True' in update
    send = inspect.getsource(BucketedWeightSender)
    used = {"send_pyobj", "recv", "close", "bind"}
    assert {call.split("(")[0] for call in send.split("self.socket.")[1:]} == used  # all that WatchedSocket can do


def sync(*arguments) -> dict:
    command = [sys.executable, "-m", "tests.helpers.refused_adapter", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))
