"""What an actor holds of its base when FSDP shards it over two ranks, with adapters around it."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.base_answers import loaded
from tests.family_models import make
from verl_aqn.mxfp4.checkpoint import quantize_checkpoint
from verl_aqn.mxfp4.held_base import held_base
from verl_aqn.mxfp4.sharding import allow_packed_shards


def rank_main(rank: int, port: int, folder: Path, version: int) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from verl.utils.fsdp_utils import get_fsdp_wrap_policy

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        allow_packed_shards()
        whole = held_base(loaded(folder).float() if version == 1 else loaded(folder), folder)
        base = loaded(folder).float() if version == 1 else loaded(folder)  # FSDP1 wants one dtype
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        if version == 1:
            wrap = get_fsdp_wrap_policy(model, None, is_lora=True)  # as verl's engine
            model = FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"))
            sharded = held_base(model, folder)
            assert (sharded.tensors, sharded.faults, sharded.digest) == (whole.tensors, [], whole.digest)
            return
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        sharded = held_base(model, folder)
        assert (sharded.tensors, sharded.faults) == (whole.tensors, [])
        assert (sharded.digest, sharded.packed_digest) == (whole.digest, whole.packed_digest)
        assert len(whole.tensors) >= 20
        if rank == 1:  # one value of its shard alone
            with torch.no_grad():
                model.base_model.model.model.layers[1].input_layernorm.weight.to_local()[0] += 1
        changed = held_base(model, folder)
        differs = [name for name, one in changed.tensors.items() if one != whole.tensors[name]]
        assert differs == ["model.layers.1.input_layernorm.weight"]  # both ranks see it
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("family", "kind", "version"), [("glm4", "packed", 2), ("llama_tied", "source", 2), ("llama_tied", "source", 1)]
)
def test_two_sharded_ranks_hold_what_a_whole_actor_holds(tmp_path, monkeypatch, family, kind, version) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    make(family, tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port, tmp_path / kind, version), nprocs=2)
