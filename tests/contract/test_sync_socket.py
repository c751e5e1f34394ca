"""Two runs on one machine use different sockets, although verl names its socket by Ray's job, equal in both."""

from types import SimpleNamespace


def test_actor_and_rollout_of_a_run_meet_in_its_own_folder(monkeypatch):
    from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

    from verl_aqn.integrations.verl.sync_socket import of_this_run
    from verl_aqn.integrations.verl.worker_extension import AqnWorkerExtension

    monkeypatch.setenv("VERL_RAY_JOB_ID", "01000000")
    monkeypatch.setenv("TMPDIR", "/tmp/aqn-one")
    worker = AqnWorkerExtension.__new__(AqnWorkerExtension)
    worker.model_runner, worker.local_rank = SimpleNamespace(vllm_config=None), 1
    verls = vLLMColocateWorkerExtension._get_zmq_handle(worker)
    assert verls == "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-1.sock"
    one = worker._get_zmq_handle()
    assert one == of_this_run(verls) == "ipc:///tmp/aqn-one/rl-colocate-zmq-01000000-replica-0-rank-1.sock"
    monkeypatch.setenv("TMPDIR", "/tmp/aqn-two")
    assert worker._get_zmq_handle() != one
