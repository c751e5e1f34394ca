"""The actor's side of a sync, which stops waiting for the rollout if the rollout has failed.

verl's sender waits for each answer for ever. If the rollout fails before it has received the whole adapter, no answer
comes. Its error is the result of another call, which verl checks only after the sender has finished.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import zmq
from verl.workers.rollout.vllm_rollout import vllm_rollout
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

from verl_aqn.errors import ProcessFault
from verl_aqn.runs.faults import in_run
from verl_aqn.runs.processes import SharedMemory

LOOK_MS = 500
TIMEOUT_S = 600  # the longest wait for one answer


class WatchedSocket:
    """A ZMQ socket that calls `check`, which may raise an error, every `LOOK_MS` ms while it waits.

    It calls `before_send` before each message.
    """

    def __init__(self, socket: zmq.Socket, check: Callable[[], None], before_send: Callable[[], None]) -> None:
        self._socket = socket
        self._check = check
        self._before_send = before_send

    def send_pyobj(self, value: Any) -> None:
        """Send the object as soon as the other side can receive it."""
        self._before_send()
        self._wait(zmq.POLLOUT)
        self._socket.send_pyobj(value)

    def recv(self) -> bytes:
        """Receive the next answer as soon as there is one."""
        self._wait(zmq.POLLIN)
        return self._socket.recv()

    def close(self) -> None:
        """Close the socket, and drop messages that were not received."""
        self._socket.close(linger=0)

    def _wait(self, event: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self._socket.poll(LOOK_MS, event):
            self._check()
            if time.monotonic() > deadline:
                raise ProcessFault(
                    f"the rollout did not receive the adapter within {TIMEOUT_S} s: its worker has failed (see the log)"
                )


class WatchedSender(BucketedWeightSender):
    """verl's sender with a `WatchedSocket`."""

    def __init__(self, *args: Any, check: Callable[[], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self.check = check

    def _init_socket(self) -> None:
        super()._init_socket()
        self.socket: Any = WatchedSocket(self.socket, self.check, _record_buffer)


def _record_buffer() -> None:
    """Record the shared memory of a transfer before anybody is waited for.

    A rollout that fails ends the run, and this process may be killed while it still waits for the first answer.
    """
    if in_run():
        SharedMemory(Path(os.environ["TMPDIR"])).look([psutil.Process()])


class WatchingAdapter(vllm_rollout.ServerAdapter):
    """verl's adapter of a rollout server, which keeps the reference to the server's answer to a sync."""

    answer: ray.ObjectRef | None = None  # only the first rank of a replica calls the server

    async def _execute_method(self, method, *args, **named):
        found = await super()._execute_method(method, *args, **named)
        if method == "update_weights_from_ipc":
            self.answer = found
        return found

    def check(self) -> None:
        """Raise the error of the rollout's side of the sync, if that has failed."""
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            ray.get(self.answer)


def watch_sync(rollout: Any) -> None:
    """Change the class of verl's existing rollout adapter, so that it sends with `WatchedSender`."""
    assert type(rollout) is vllm_rollout.ServerAdapter, type(rollout)
    rollout.__class__ = WatchingAdapter
    vllm_rollout.BucketedWeightSender = partial(WatchedSender, check=rollout.check)
