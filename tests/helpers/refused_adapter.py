"""`python -m tests.helpers.refused_adapter BUCKETS [before|within]`: a sync that fails in the receiver.

verl's own sender and receiver are used. vLLM rejects the adapter, or the receiver fails before or while it receives
anything. This runs in its own process, because verl chooses its platform only once. The result is one JSON line.
"""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["VERL_PLATFORM"] = "cpu"

import torch
import zmq


def main(buckets: int, fails: str = "") -> dict:
    import verl_aqn.integrations.verl.verl_plugin  # noqa: F401  (registers the CPU)
    from verl_aqn.integrations.verl.sync import WatchedSender
    from verl_aqn.integrations.verl.worker_extension import AqnWorkerExtension

    folder = tempfile.mkdtemp(prefix="aqn-")
    os.environ |= {"TMPDIR": folder, "VERL_AQN_ERRORS": f"{folder}/errors.jsonl"}  # as in a run's process
    handle = f"ipc://{folder}/sync"

    class Worker(AqnWorkerExtension):
        device = torch.device("cpu")
        _is_qat_model = _is_modelopt_qat = False

        def __new__(cls):
            return object.__new__(cls)

        def _get_zmq_handle(self):
            return handle

        def remove_lora(self, lora_id):
            return True

        def add_lora(self, request):
            raise ValueError("target_modules: 'in_proj' is not supported")

    weights = [(f"w{number}", torch.ones(300 << 10)) for number in range(buckets)]  # 1.2 MB each
    sent, said, failed = [], "", []

    def check():
        if failed:
            raise failed[0]

    sender = WatchedSender(check=check, zmq_handle=handle, bucket_size_mb=2, use_shm=True)

    def send():
        try:
            asyncio.run(sender.async_send_weights(iter(weights)))
            sent.append(len(weights))
        except RuntimeError as error:
            sent.append(str(error))

    thread = threading.Thread(target=send)
    thread.start()
    began = time.monotonic()
    if fails == "before":  # no receiver takes the first message
        failed.append(RuntimeError("the rollout failed"))
    elif fails == "within":  # a receiver takes the message and ends without answering
        taker = zmq.Context.instance().socket(zmq.REP)
        taker.connect(handle)
        taker.recv()
        taker.close()
        failed.append(RuntimeError("the rollout failed"))
    try:
        if fails:
            raise ValueError("no rollout")
        Worker().update_weights_from_ipc(peft_config={"r": 4}, base_sync_done=True, use_shm=True)
    except ValueError as error:
        said = str(error)
    thread.join(timeout=60)
    noted = Path(folder) / "shared-memory"
    count = len(noted.read_text().splitlines()) if noted.exists() else 0
    shutil.rmtree(folder)
    return {"said": said, "sent": sent, "seconds": time.monotonic() - began, "noted": count}


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(int(sys.argv[1]), *sys.argv[2:])), flush=True)
