"""The process group of the actor's ranks, with a store that other users cannot reach if possible."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist
from verl.utils.device import get_device_name, get_nccl_backend

from verl_aqn.cluster.worker_setup import TEMPORARY

TIMEOUT = timedelta(minutes=30)
"""Maximum wait of ranks for each other, first at the store and then in the group: nodes load models at unequal speeds.

torch's own defaults differ: 5 minutes for a store, 10 for NCCL, 30 for gloo.
"""


def open_process_group() -> None:
    """Create the process group before verl does; verl keeps an existing group.

    On one machine the store is a file in the run's own temporary folder. On several machines the store is a server on
    the first rank, without a password. torch would bind this server to all addresses of the machine; here it is bound
    only to the address at which verl lets the ranks meet. On a CPU verl's backend would be "cpu:gloo,cpu:gloo", which
    torch rejects.
    """
    if dist.is_initialized():
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: dist.Store
    if TEMPORARY not in os.environ:
        store = dist.FileStore(f"{os.environ['TMPDIR']}/ranks-{port}", world)
    elif rank == 0:
        listening = socket.create_server((host, port)).detach()  # the store closes it
        store = dist.TCPStore(host, port, world, is_master=True, master_listen_fd=listening, timeout=TIMEOUT)
    else:
        store = dist.TCPStore(host, port, world, is_master=False, timeout=TIMEOUT)
    store.set_timeout(TIMEOUT)
    device = get_device_name()
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{get_nccl_backend()}"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
