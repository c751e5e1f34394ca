"""Only the first rank reads the base. The other rank's base is on meta until FSDP2 sends its shards."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.helpers.base_answers import loaded
from tests.helpers.family_models import make
from verl_aqn.checkpoints.actual_base import actual_base
from verl_aqn.checkpoints.packing import quantize_checkpoint

pytest.importorskip("verl")
FOLDERS = ("packed", "source", "moe", "tied")


def check(rank: int, folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict

    from verl_aqn.integrations.verl.packed_base import PackedBase, norm_tensors
    from verl_aqn.models.layouts import attention_of, use_attention
    from verl_aqn.noise import NoiseInjector

    engine = object.__new__(PackedBase)
    engine.model_config = SimpleNamespace(local_path=str(folder), override_config={})
    engine.engine_config = SimpleNamespace(strategy="fsdp2")
    module = engine._causal_model(noisy=True)
    engine.use_remove_padding, engine.ulysses_sequence_parallel_size = False, 1
    engine._decide_layout(module, share=True)
    told = [None] * 2
    dist.all_gather_object(told, (engine.layout, attention_of(module)))
    assert told[0] == told[1]
    whole = loaded(folder)
    norms = norm_tensors(module)
    real = {name for name, tensor in module.state_dict().items() if not tensor.is_meta}
    assert real == (set(norms) if rank and folder.name != "tied" else set(module.state_dict()))
    assert all(torch.equal(module.get_parameter(name), whole.get_parameter(name)) for name in norms)
    assert NoiseInjector(module, beside=True).clean_digest == NoiseInjector(whole, beside=True).clean_digest
    module.requires_grad_(False)
    module = get_peft_model(module, LoraConfig(r=4, target_modules=["q_proj"]))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)
    settings = {"mesh": mesh, "mp_policy": policy, "offload_policy": None, "reshard_after_forward": True}
    state = module.state_dict()
    apply_fsdp2(module, settings, {"wrap_policy": {}})
    fsdp2_load_full_state_dict(module, state, mesh, None)
    actual, expected = actual_base(module, folder), actual_base(loaded(folder), folder)
    assert actual.tensors == expected.tensors
    assert (actual.digest, actual.faults) == (expected.digest, [])
    tokens = torch.arange(1, 9).unsqueeze(0)
    use_attention(module.get_base_model(), "eager")  # the attention for shared prompts needs a layout
    got, want = module(tokens).logits.float(), loaded(folder)(tokens).logits.float()
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.999


def rank_main(rank: int, port: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for name in FOLDERS:
            check(rank, root / name / "packed" if name == "moe" else root / name)
    finally:
        dist.destroy_process_group()


def test_a_rank_that_read_nothing_holds_its_shards_of_what_the_first_one_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    make("glm4", tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    make("qwen3_moe", tmp_path / "moe" / "source")
    quantize_checkpoint(tmp_path / "moe" / "source", tmp_path / "moe" / "packed")
    make("llama_tied", tmp_path / "tied")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, args=(port, tmp_path), nprocs=2)
