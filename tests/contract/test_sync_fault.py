"""An adapter that vLLM refuses is told at once, over verl's own sender and receiver."""

import asyncio
import os
import threading
import time

import pytest
import torch
import zmq


@pytest.fixture(autouse=True)
def cpu():
    os.environ.setdefault("VERL_PLATFORM", "cpu")


@pytest.mark.parametrize("buckets", [1, 3])
def test_a_refused_adapter_is_raised_with_its_text_and_the_sender_goes_on(tmp_path, buckets):
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    import verl_aqn.verl_api.plugin  # noqa: F401  (registers the CPU)
    from verl_aqn.verl_api.worker_extension import AqnWorkerExtension

    handle = f"ipc://{tmp_path}/sync"

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
    sender = BucketedWeightSender(handle, bucket_size_mb=2, use_shm=True)
    context = zmq.Context.instance()
    for timeout in (zmq.RCVTIMEO, zmq.SNDTIMEO):
        context.setsockopt(timeout, 20_000)
    sent = []

    def send():
        asyncio.run(sender.async_send_weights(iter(weights)))
        sent.append(len(weights))

    thread = threading.Thread(target=send)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(ValueError, match="'in_proj' is not supported"):
            Worker().update_weights_from_ipc(peft_config={"r": 4}, base_sync_done=True, use_shm=True)
        thread.join(timeout=25)
    finally:
        for timeout in (zmq.RCVTIMEO, zmq.SNDTIMEO):
            context.setsockopt(timeout, -1)
    assert sent == [buckets]
    assert time.monotonic() - began < 10
