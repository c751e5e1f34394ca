"""An adapter that vLLM rejects, or a receiver that fails, is reported at once by verl's own sender and receiver."""

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
    assert told["seconds"] < 30  # stock verl would wait forever
    assert told["noted"] == 1  # the shared memory of the transfer, which a killed process would leave behind


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_receiver_that_failed_ends_the_sync(moment):
    told = sync(1, moment)
    assert told["sent"] == ["the rollout failed"]
    assert told["seconds"] < 10  # stock verl would wait forever
    assert told["noted"] == 1  # also if nobody has answered: this process may be killed while it waits


def test_verl_s_adapter_sends_by_what_we_put_there():
    """verl uses its sender by the name in its module, after it has called the server through a method that we see."""
    from verl.workers.rollout.vllm_rollout import vllm_rollout
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    update = inspect.getsource(vllm_rollout.ServerAdapter.update_weights)
    assert "sender = BucketedWeightSender(" in update
    assert '_execute_method(\n            "update_weights_from_ipc",\n            non_block=True' in update
    send = inspect.getsource(BucketedWeightSender)
    used = {"send_pyobj", "recv", "close", "bind"}
    assert {call.split("(")[0] for call in send.split("self.socket.")[1:]} == used  # all methods of WatchedSocket


def sync(*arguments) -> dict:
    command = [sys.executable, "-m", "tests.helpers.refused_adapter", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("RESULT "))
