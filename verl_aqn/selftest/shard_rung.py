"""The rung of FSDP2: a packed base in shards, on as many ranks as there are devices.

`python -m verl_aqn.selftest.shard_rung RANK WORLD DEVICE FOLDER` is one rank; it writes FOLDER/rank<RANK>.json.
"""

import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from verl_aqn.digest import tensor_digest
from verl_aqn.mxfp4 import Mxfp4Linear
from verl_aqn.mxfp4.sharding import allow_packed_shards
from verl_aqn.selftest.devices import runtime
from verl_aqn.selftest.rung import Broken, Context, Reading

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
CPU_RANKS = 2
FEATURES, RANK, ROWS = 256, 8, 4
CLOSE = {False: 1e-5, True: 3e-2}
"""Largest allowed relative distance from one process, in float32 and with bfloat16 mixed precision."""
LOOSE = {False: 1e-3, True: 3e-2}
"""The same on an accelerator, where products of other sizes are summed in another order, and float32 may be rounded."""
RANK_MODULE = "verl_aqn.selftest.shard_rung"


class Layer(nn.Module):
    """A packed layer with an adapter B·A, as PEFT adds it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Mxfp4Linear.from_linear(nn.Linear(FEATURES, FEATURES, bias=False))
        self.base.compute_dtype = torch.float32
        self.a, self.b = nn.Linear(FEATURES, RANK, bias=False), nn.Linear(RANK, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def check(context: Context) -> Reading:
    """Start the ranks, wait for all, and compare what they report."""
    world = CPU_RANKS if context.device == "cpu" else context.count
    for file in context.folder.glob("*"):
        file.unlink()  # what an earlier trial left would be read as this one's
    command = [sys.executable, "-m", RANK_MODULE]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), context.device, str(context.folder)])
        for rank in range(world)
    ]
    _join(ranks)
    found = [_read(context.folder / f"rank{rank}.json", one) for rank, one in enumerate(ranks)]
    for rank, one in enumerate(found):
        if "fault" in one:
            raise Broken(f"rank {rank} of {world}: {one['fault']}")
    for key in ("gathered", "trained"):
        if len({one[key] for one in found}) != 1:
            raise Broken(f"the ranks have different {key} weights")
    held, whole = sum(one["bytes"] for one in found), found[0]["whole_bytes"]
    if held != whole:
        raise Broken(f"the {world} ranks hold {held} packed bytes together instead of {whole}")
    worst = max(one["worst"] for one in found)
    return Reading(
        f"{world} ranks ({BACKENDS[context.device]}): each holds 1/{world} of the packed bytes; gathered equal; "
        f"outputs and trained adapters within {worst:.1e} of one process",
        {"ranks": world, "backend": BACKENDS[context.device], "worst": worst, "bytes": held},
    )


def _join(ranks: list[subprocess.Popen]) -> None:
    """Wait until all ranks have ended. If one fails, end the others, which would wait for it for ever."""
    while None in (codes := [rank.poll() for rank in ranks]):
        if any(codes):
            time.sleep(2)  # the others may be about to report their own fault
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.1)


def _read(file: Path, rank: subprocess.Popen) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {"fault": f"its process ended with {rank.returncode}"}


def rank_of(rank: int, world: int, device: str, folder: Path) -> dict[str, Any]:
    """Shard, compute and train on one rank, and compare with the same in this process alone.

    Raises:
        Broken: a shard, a gathered weight, an output or a trained adapter is wrong.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        runtime(device).set_device(rank)
    dist.init_process_group(BACKENDS[device], init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    allow_packed_shards()
    found: dict[str, Any] = {"worst": 0.0}
    for mixed in (False, True):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        alone, model = _model(device), _model(device)
        for layer in model:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        first: Any = model[0]
        shard = first.base.weight_packed
        if shard.dtype != torch.uint8 or shard.to_local().shape[0] > -(-FEATURES // world):
            raise Broken(
                f"the shard is {shard.dtype} {list(shard.to_local().shape)} of {FEATURES} rows on {world} ranks"
            )
        x = torch.randn(world, ROWS, FEATURES, generator=torch.Generator().manual_seed(1)).to(device)
        ours, theirs = _train(model, x[rank], device, mixed), _train(alone, x.flatten(0, 1), device, mixed)
        own = slice(ROWS * rank, ROWS * (rank + 1))
        pairs = [("output", ours, theirs[own])]
        bytes_, gathered, trained = 0, [], []
        for (name, one), (_, other) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            whole = one.full_tensor().detach()  # type: ignore[attr-defined]
            if one.dtype == torch.uint8:
                bytes_ += one.to_local().nbytes  # type: ignore[attr-defined]
                gathered.append(whole.flatten().cpu())
                if not torch.equal(whole, other):
                    raise Broken(f"{name} is not what it was before it was sharded")
            else:
                trained.append(whole.flatten().float().cpu())
                pairs.append((name, whole, other.detach()))
        allowed = (CLOSE if device == "cpu" else LOOSE)[mixed]
        for name, got, want in pairs:
            far = float((got.double() - want.double()).norm() / want.double().norm())
            if not far <= allowed:
                raise Broken(f"{name} is {far:.1e} from one process (allowed {allowed:g}, bfloat16: {mixed})")
            found["worst"] = max(found["worst"], far)
        found |= {
            "bytes": bytes_, "whole_bytes": sum(p.nbytes for p in alone.parameters() if p.dtype == torch.uint8),
            "gathered": _digest(gathered), "trained": _digest(trained),
        }  # fmt: skip
    dist.destroy_process_group()
    return found


def _model(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()).to(device)


def _train(model: nn.Module, x: Tensor, device: str, mixed: bool) -> Tensor:
    """Make one step of training and return the output after it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        loss = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=mixed):
        return model(x)


def _digest(tensors: list[Tensor]) -> str:
    return tensor_digest((str(number), tensor) for number, tensor in enumerate(tensors))


def main(rank: int, world: int, device: str, folder: Path) -> None:
    """Run one rank, and write what it found or its fault."""
    try:
        found = rank_of(rank, world, device, folder)
    except Exception as error:
        traceback.print_exc()
        found = {"fault": (str(error).strip() or type(error).__name__).splitlines()[0]}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    sys.exit("fault" in found)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
