"""The process group of the actor's ranks, whose store is open to nobody else where it can be."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist
from verl.utils.device import get_device_name, get_nccl_backend

from verl_aqn.cluster.worker_setup import TEMPORARY

TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other, first at the store and then in the group: nodes load a model at different speeds.

torch's own defaults differ: 5 minutes for a store, 10 for NCCL, 30 for gloo.
"""


def open_process_group() -> None:
    """Make the group before verl does, which keeps one that exists.

    On one machine its store is a file in the run's own temporary folder. On several it is a server on the first rank,
    which knows no password: torch binds it to every address of the machine, this one is bound to the address at which
    verl has the ranks meet. On a CPU verl's backend would be "cpu:gloo,cpu:gloo", which torch refuses.
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
