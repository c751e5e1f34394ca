"""Rank files of a LoRA layer that FSDP2 has sharded, written by real ranks; light, because each rank imports it."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


class Lora(nn.Module):
    """A [6, 64] and B [25, 6] under PEFT's names; two ranks hold 13 and 12 of the 25 rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_A["default"], self.lora_B["default"] = nn.Linear(64, 6, bias=False), nn.Linear(6, 25, bias=False)


def save_sharded(folder: Path) -> None:
    """Write `model_world_size_2_rank_<R>.pt` of a `Lora` called ``layer``, as verl saves it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_save_rank, args=(port, str(folder)), nprocs=2)


def _save_rank(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = Lora()
        fully_shard(model)
        state = {f"base_model.model.layer.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save(state, f"{folder}/model_world_size_2_rank_{rank}.pt")
    finally:
        dist.destroy_process_group()
