"""The actor's side of a sync: it waits for the rollout's answer only as long as the rollout is at it.

verl's sender waits for each answer without end. Where the rollout fails before it has taken all of the adapter, no
answer comes, and its error, which is the answer to another call, is not looked at before the sender is done.
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
TIMEOUT_S = 600  # for one answer


class WatchedSocket:
    """A ZMQ socket that, while it waits, calls `check` every `LOOK_MS` ms, which may raise."""

    def __init__(self, socket: zmq.Socket, check: Callable[[], None]) -> None:
        self._socket = socket
        self._check = check

    def send_pyobj(self, value: Any) -> None:
        """As the socket's, once somebody is there to take it."""
        self._wait(zmq.POLLOUT)
        self._socket.send_pyobj(value)

    def recv(self) -> bytes:
        """As the socket's, once there is an answer."""
        self._wait(zmq.POLLIN)
        return self._socket.recv()

    def close(self) -> None:
        """What nobody took is dropped."""
        self._socket.close(linger=0)

    def _wait(self, event: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self._socket.poll(LOOK_MS, event):
            self._check()
            if time.monotonic() > deadline:
                raise ProcessFault(
                    f"the rollout did not take the adapter within {TIMEOUT_S} s: its worker has failed (see the log)"
                )


class WatchedSender(BucketedWeightSender):
    """verl's sender over such a socket."""

    def __init__(self, *args: Any, check: Callable[[], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self.check = check

    def _init_buffer(self) -> None:
        super()._init_buffer()
        if in_run():  # it may be gone before the next look, or be left behind by a kill
            SharedMemory(Path(os.environ["TMPDIR"])).look([psutil.Process()])

    def _init_socket(self) -> None:
        super()._init_socket()
        self.socket: Any = WatchedSocket(self.socket, self.check)


class WatchingAdapter(vllm_rollout.ServerAdapter):
    """verl's adapter of a rollout, which keeps what will be the server's answer to a sync."""

    answer: ray.ObjectRef | None = None  # a replica's first rank asks for all of them

    async def _execute_method(self, method, *args, **named):
        found = await super()._execute_method(method, *args, **named)
        if method == "update_weights_from_ipc":
            self.answer = found
        return found

    def check(self) -> None:
        """Raise what the rollout's side of the sync raised, if it has failed."""
        if self.answer is not None and ray.wait([self.answer], timeout=0)[0]:
            ray.get(self.answer)


def watch_sync(rollout: Any) -> None:
    """Let verl's rollout adapter, which verl made by itself, send like that."""
    assert type(rollout) is vllm_rollout.ServerAdapter, type(rollout)
    rollout.__class__ = WatchingAdapter
    vllm_rollout.BucketedWeightSender = partial(WatchedSender, check=rollout.check)
