"""The actor's process group: where its store listens, and that verl keeps the group."""

import os
import socket
import subprocess
import sys

import pytest

from verl_aqn.cluster.worker_setup import TEMPORARY

RANK = """
import os, sys
import psutil, torch
import torch.distributed as dist
from verl_aqn.integrations.verl import verl_plugin as plugin
from verl_aqn.integrations.verl.process_group import TIMEOUT, open_process_group

open_process_group()
group = dist.group.WORLD
# As long at the store where ranks meet as in the group: torch would wait 5 minutes there, and 30 here.
meeting = dist.distributed_c10d._get_default_store()
while hasattr(meeting, "underlying_store"):
    meeting = meeting.underlying_store
assert meeting.timeout == TIMEOUT == group._get_backend(torch.device("cpu")).options._timeout, meeting.timeout
from verl.utils.distributed import initialize_global_process_group_ray
initialize_global_process_group_ray()
assert dist.group.WORLD is group
total = torch.ones(1)
dist.all_reduce(total)
sockets = psutil.Process().net_connections("tcp")
print(int(total), sorted({c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN}))
dist.barrier()
"""


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_ranks_meet_at_one_address_and_listen_at_no_other(nodes, tmp_path):
    place = {"MASTER_ADDR": "127.0.0.3", "MASTER_PORT": str(free_port("127.0.0.3")), "GLOO_SOCKET_IFNAME": "lo"}
    env = {**os.environ, **place, "WORLD_SIZE": "2", "VERL_PLATFORM": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"TMPDIR": str(tmp_path)} if nodes == 1 else {TEMPORARY: str(tmp_path)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env=env | {"RANK": str(n)}, stdout=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    out = [rank.communicate(timeout=300)[0].splitlines()[-1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    stores = "" if nodes == 1 else ", '127.0.0.3'"
    assert out == [f"2 ['127.0.0.1'{stores}]", "2 ['127.0.0.1']"]  # sockets of gloo and of the store


def test_stock_verl_opens_its_own_group_on_a_cpu():
    """verl requests "cpu:gloo,cpu:gloo", which torch rejects; with the plugin installed it gets gloo."""
    code = (
        "import verl, torch.distributed as dist\n"
        "from verl.workers.engine_workers import initialize_global_process_group_ray\n"
        "initialize_global_process_group_ray(timeout_second=None)\n"
        "from verl.workers.engine import EngineRegistry\n"
        "engine = EngineRegistry.get_engine_cls('language_model', 'fsdp2')\n"
        "print(dist.get_backend(), dist.get_world_size(), engine.__name__)"
    )
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port("127.0.0.1")), "WORLD_SIZE": "1", "RANK": "0"}
    env = {**os.environ, **place, "VERL_PLATFORM": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    env["VERL_ENGINE_DEVICE"] = "cuda"  # verl registers its engines for accelerators only
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["gloo", "1", "FSDPEngineWithLMHead"], result.stderr[-2000:]
