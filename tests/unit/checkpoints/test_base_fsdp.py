"""An actor's base when FSDP shards it over two ranks, with adapters around it."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.base_answers import loaded
from tests.helpers.family_models import make
from verl_aqn.checkpoints.actual_adapter import ActualAdapter, actual_adapter
from verl_aqn.checkpoints.actual_base import ActualBase, actual_base
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.mxfp4.sharding import allow_packed_shards


def adapted(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # the same adapter on both ranks
    return get_peft_model(loaded(folder).to(dtype), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def check_fsdp2(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    whole, model = actual_base(loaded(folder), folder), adapted(folder, torch.bfloat16)
    adapter = actual_adapter(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = model.base_model.model.model.layers
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    assert_equal(actual_base(model, folder), whole)
    assert_same_adapter(actual_adapter(model), adapter)
    if rank == 1:  # one value, only in its shard
        with torch.no_grad():
            layers[1].input_layernorm.weight.to_local()[0] += 1
    differs = [name for name, one in actual_base(model, folder).tensors.items() if one != whole.tensors[name]]
    assert differs == ["model.layers.1.input_layernorm.weight"]  # both ranks see it


def check_fsdp1(folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from verl.utils.fsdp_utils import get_fsdp_wrap_policy

    model = adapted(folder, torch.float32)  # FSDP1 needs a single dtype
    adapter = actual_adapter(model)
    wrap = get_fsdp_wrap_policy(model, None, is_lora=True)
    model = FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=torch.device("cpu"))
    assert_equal(actual_base(model, folder), actual_base(loaded(folder).float(), folder))
    assert_same_adapter(actual_adapter(model), adapter)


def assert_same_adapter(sharded: ActualAdapter, whole: ActualAdapter) -> None:
    assert (sharded.scalings, sharded.faults) == (whole.scalings, [])
    assert sharded.tensors.keys() == whole.tensors.keys()
    assert len(whole.tensors) >= 4
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in sharded.tensors.items())


def assert_equal(sharded: ActualBase, whole: ActualBase) -> None:
    assert (sharded.tensors, sharded.faults) == (whole.tensors, [])
    assert (sharded.digest, sharded.packed_digest) == (whole.digest, whole.packed_digest)
    assert len(whole.tensors) >= 20


def rank_main(rank: int, port: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        allow_packed_shards()
        check_fsdp2(rank, root / "packed")
        check_fsdp2(rank, root / "tied")
        check_fsdp1(root / "tied")
    finally:
        dist.destroy_process_group()


def test_two_sharded_ranks_hold_what_a_whole_actor_holds(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    make("llama_tied", tmp_path / "tied")
    make("glm4", tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port, tmp_path), nprocs=2)
