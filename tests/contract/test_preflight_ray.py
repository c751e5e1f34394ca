"""What the checks before a run assume about vLLM, verl and Ray."""

import json
import os
import subprocess
import sys
import tempfile
from typing import get_args

import pytest

from verl_aqn.cluster.process_environment import local_ray
from verl_aqn.config.serving import ADAPTER_RANKS, served_rank

HEAD = """
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""


def test_adapter_ranks_are_vllm_s_and_verl_takes_the_next_one():
    from verl.workers.rollout.vllm_rollout.utils import get_vllm_max_lora_rank
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ADAPTER_RANKS
    assert [get_vllm_max_lora_rank(rank) for rank in (1, 2, 33, 512)] == [1, 8, 64, 512]
    assert [served_rank(rank) for rank in (1, 2, 33, 512)] == [1, 8, 64, 512]
    with pytest.raises(ValueError, match="less than or equal to 512"):
        get_vllm_max_lora_rank(513)


@pytest.fixture
def ray_env():
    """Environment of a Ray on this machine."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="aqn-", dir="/tmp") as temporary:
        yield env | {"VERL_PLATFORM": "cpu"} | local_ray(temporary)


def test_every_node_of_a_cluster_answers_as_this_machine_does(tmp_path, ray_env):
    """The command joins a real Ray with one node, as a run would."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HEAD], env=ray_env, stdin=pipe, stdout=pipe, text=True) as head:
        address = head.stdout.readline().strip()
        code = "import json; from verl_aqn.preflight.node import cluster_nodes; "
        code += f"nodes, has = cluster_nodes({address!r}, {str(tmp_path)!r}, 'cpu'); "
        code += "print(json.dumps([[node.to_dict() for node in nodes], has]))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=ray_env, capture_output=True, text=True, timeout=600, check=False)
        head.communicate("\n")
    assert done.returncode == 0, done.stderr[-2000:]
    (node,), has = json.loads(done.stdout.splitlines()[-1])
    assert has["CPU"] == 1.0
    assert node["missing"] == []
    assert {"verl", "vllm", "torch", "verl-aqn"} <= node["versions"].keys()
    assert node["shared_memory"] > 0 < node["disk"]
    assert node["devices"] == []
    assert abs(node["skew"]) <= node["doubt"] + 0.01  # one clock


@pytest.mark.parametrize(
    ("module", "there"), [("verl_aqn.tasks.gsm8k", True), ("verl_aqn.nothing", False), ("nowhere.at.all", False)]
)
def test_a_node_tells_whether_it_has_a_reward_s_module(module, there):
    from verl_aqn.integrations.verl.cluster_nodes import _importable

    assert _importable(module) is there
