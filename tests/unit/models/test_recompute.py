"""MLPs that are computed again in backward: same values, same gradients, less memory between the passes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.helpers.sharing_models import SHARING, make
from verl_aqn.models import recompute
from verl_aqn.models.recompute import find_mlps, recompute_mlps

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss")
DENSE = [name for name in SHARING if "moe" not in name and "deepseek" not in name and "llama4" not in name]


def adapted(name: str) -> nn.Module:
    model = get_peft_model(make(name), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.train()


@pytest.mark.parametrize("name", [name for name in DENSE if name not in EXPERTS])
def test_values_and_gradients_are_those_of_the_model_as_it_is(name, monkeypatch):
    monkeypatch.setattr(recompute, "WORTH", 0)
    torch.manual_seed(0)
    model = adapted(name)
    trained = {key: one for key, one in model.named_parameters() if one.requires_grad}

    def outcome() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(IDS, use_cache=False).logits
        gradients = torch.autograd.grad(logits.float().square().sum(), trained.values(), allow_unused=True)
        return logits.detach(), {key: one for key, one in zip(trained, gradients, strict=True) if one is not None}

    plain = outcome()
    layers = model.config.get_text_config().num_hidden_layers
    assert recompute_mlps(model) == layers
    again = outcome()
    assert torch.equal(plain[0], again[0])
    assert plain[1].keys() == again[1].keys()
    assert len(plain[1]) >= 2 * layers
    for key, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][key]), key


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_and_attention_stay_as_they_are(name):
    assert recompute_mlps(adapted(name)) == 0


class Normed(nn.Module):
    """An MLP with a norm, whose weight may have changed before the backward pass, as noise does it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(hidden)))


class Two(Normed):
    """A module of two inputs, as attention is."""

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(hidden)) * mask


class Scaled(Normed):
    """A module with a parameter of its own, which may be a norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.Identity(), nn.Parameter(torch.ones(8))


def test_a_module_with_a_norm_a_parameter_or_two_inputs_is_no_mlp():
    plain, two = Normed(), Two()
    plain.norm, two.norm = nn.Identity(), nn.Identity()
    assert list(find_mlps(nn.Sequential(plain, Normed(), Scaled(), two))) == [plain]


def saved(model: nn.Module, ids: torch.Tensor) -> int:
    """Return how many bytes of activations a forward keeps for backward."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(ids, use_cache=False).logits
    del logits
    return sum(one.untyped_storage().nbytes() for one in kept.values())


def test_inner_features_are_kept_for_few_tokens_only(monkeypatch):
    torch.manual_seed(0)
    model = make("llama")
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    inner, layers = model.config.intermediate_size, model.config.num_hidden_layers
    monkeypatch.setattr(recompute, "WORTH", 8 * inner * IDS.numel() * layers)
    few = IDS[:, 1:]
    plain, plain_few = saved(model, IDS), saved(model, few)
    recompute_mlps(model)
    assert saved(model, few) == plain_few
    # fp32 here: gate, its activation, up, and their product; PEFT keeps nothing of its own inputs beside them
    assert plain - saved(model, IDS) >= layers * IDS.numel() * 4 * 4 * inner


def test_nothing_is_computed_twice_without_gradients(monkeypatch):
    monkeypatch.setattr(recompute, "WORTH", 0)
    model = make("llama")
    recompute_mlps(model)
    monkeypatch.setattr(recompute, "checkpoint", None)
    with torch.no_grad():
        model(IDS)
