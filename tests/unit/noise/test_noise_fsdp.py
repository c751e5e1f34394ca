"""Noise in an actor whose parameters FSDP2 shards over two ranks and casts to bfloat16."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from verl_aqn.noise import NoiseInjector, NoiseSpec, check_evidence

ORDER = NoiseSpec(step=2, seed=5, sigma=1e-3, unit="absolute")  # below bfloat16's spacing at 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(64, eps=1e-5), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    for block in model:
        block.norm.weight.requires_grad_(False)
    return model


def rank_main(rank: int, port: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        model, whole = make(), make().bfloat16()
        injector, twin = NoiseInjector(model, beside=True), NoiseInjector(whole, beside=True)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        clean = model(x).detach()
        evidence = injector.apply(ORDER)
        check_evidence(evidence, ORDER, injector.clean_digest)
        twin.apply(ORDER)
        noisy = model(x)
        assert torch.equal(noisy, whole(x)), "sharded and whole actor differ under the same noise"
        assert not torch.equal(noisy, clean)
        noisy.float().square().mean().backward()
        assert model[0].linear.weight.grad is not None
        assert torch.equal(model[0].norm.weight.full_tensor(), make()[0].norm.weight)
        assert injector.uses() == 1
        injector.restore()
        assert torch.equal(model(x), clean)
    finally:
        dist.destroy_process_group()


def test_two_sharded_ranks_have_the_noise_of_a_whole_actor() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port,), nprocs=2)
