"""The critic's module: the actor's base, with adapters and a value head as the only trained parts."""

import pytest
import torch

from tests.helpers.engines import bare_engine
from verl_aqn.checkpoints.cached import quantized_cache
from verl_aqn.integrations.verl import packed_base
from verl_aqn.integrations.verl.critic import AqnValueEngine
from verl_aqn.models import recompute
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.tasks.smollm2 import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("critic")
    plain = tiny_model(base / "tiny")
    return {"plain": plain, "packed": quantized_cache(plain, base / "mxfp4", "mse", ("lm_head", "embed_tokens"), ())}


@pytest.fixture(params=["packed", "plain"])
def module(request, folders):
    engine = bare_engine(AqnValueEngine, folders[request.param], {"attn_implementation": "sdpa"})
    built = engine._build_lora_module(engine._build_module())
    assert len(list(packed_layers(built))) == (14 if request.param == "packed" else 0)
    return built


def test_values_start_at_zero_and_only_adapters_and_head_are_trained(module):
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".adapter_" in name for name in trained)
    assert sum("adapter_row" in name for name in trained) == 1
    assert {p.dtype for p in trained.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        values = module(torch.arange(6).reshape(2, 3)).logits
    assert values.shape == (2, 3, 1)
    assert not values.any()


def test_a_value_teaches_head_and_adapters_and_leaves_the_embedding_alone(module):
    before = module.get_input_embeddings().weight.clone()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            values = module(torch.arange(6).reshape(2, 3)).logits
        loss = (values.float() - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == 1.0
    assert losses[2] < losses[1] < losses[0]
    moved = [p for name, p in module.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in moved)
    assert torch.equal(module.get_input_embeddings().weight, before)


@pytest.mark.parametrize(("device", "checkpointing", "mlps"), [("cpu", False, 2), ("cpu", True, 0), ("cuda", False, 0)])
def test_mlps_are_computed_again_on_cpus_unless_whole_layers_are(folders, device, checkpointing, mlps, monkeypatch):
    monkeypatch.setattr(recompute, "WORTH", 0)
    monkeypatch.setattr(packed_base, "get_device_name", lambda: device)
    again = []
    monkeypatch.setattr(recompute, "checkpoint", lambda compute, hidden, **_: again.append(1) or compute(hidden))
    engine = bare_engine(AqnValueEngine, folders["packed"], {"attn_implementation": "sdpa"})
    engine.model_config.enable_gradient_checkpointing = checkpointing
    built = engine._build_lora_module(engine._build_module())
    with torch.autocast("cpu", torch.bfloat16):
        built(torch.arange(6).reshape(2, 3))
    assert len(again) == mlps
