"""One forward for log-probs and update: verl's own `forward_step` and loss, on a small model with adapters."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

from tests.helpers.micro_batches import batch, engine_of, jagged, samples
from tests.helpers.sharing_models import make
from verl_aqn.config.compose import load_recipe
from verl_aqn.integrations.verl import kept_forward
from verl_aqn.integrations.verl.kept_forward import KEPT, is_random_in_training
from verl_aqn.integrations.verl.platform_cpu import PlatformCPU
from verl_aqn.models import recompute
from verl_aqn.preflight.prepare import keeps_forward, tell_workers


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """Make this machine's CPU verl's device."""
    monkeypatch.setattr("verl.plugin.platform.platform_manager._current_platform", PlatformCPU())


class Counted:
    """An engine of a model with adapters, and the number of its model's forwards."""

    def __init__(self, kind: str = "llama", keeps: bool = True):
        model = make(kind)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.engine = engine_of(model)
        self.module = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        self.engine.module = self.module
        self.engine._decide_scores(self.module)
        self.engine.model_config.override_config = {KEPT: keeps}
        self.engine.model_config.hf_config = model.config
        self.engine.engine_config.max_token_len_per_gpu = 1000
        self.engine._autocast_dtype = torch.float32
        self.engine.get_data_parallel_group = lambda: None
        self.forwards = 0
        self.module.register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.forwards += 1

    def log_probs(self, data) -> torch.Tensor:
        """Return the log-probs of a batch as verl's actor computes them before the update."""
        self.module.eval()
        self.engine._rows = len(data)
        tu.assign_non_tensor(data, calculate_entropy=True)
        with torch.no_grad():
            _, output = self.engine.forward_step(data, None, forward_only=True)
        assert not output["model_output"]["log_probs"].requires_grad
        return response_from_nested(output["model_output"]["log_probs"], data["response_mask"])

    def reference(self, data) -> None:
        """Compute the log-probs of the reference policy."""
        with torch.no_grad(), self.module.disable_adapter():
            self.engine.adapter_is_off = True
            self.engine.forward_step(data, None, forward_only=True)
            self.engine.adapter_is_off = False

    def update(self, data, old: torch.Tensor, entropy_coeff: float = 0.0) -> tuple[float, dict[str, torch.Tensor]]:
        """Return loss and gradients of verl's PPO loss."""
        self.module.train()
        self.module.zero_grad()
        data = data.clone()
        data["old_log_probs"] = old
        generator = torch.Generator().manual_seed(3)
        data["advantages"] = jagged([torch.randn(len(row), generator=generator) for row in old.unbind()])
        told = {"dp_size": 1, "batch_num_tokens": len(old.values()), "global_batch_size": len(data)}
        tu.assign_non_tensor(data, calculate_entropy=bool(entropy_coeff), **told)
        config = FSDPActorConfig(
            strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, entropy_coeff=entropy_coeff
        )
        loss, _ = self.engine.forward_step(data, partial(ppo_loss, config), forward_only=False)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}


def given(seed: int = 0):
    prompts, responses = samples()
    data = batch(prompts, [response - seed for response in responses])
    data["response_mask"] = jagged([torch.ones_like(response) for response in responses])
    return data


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_next"])  # chunked; all logits; separate rows
def test_an_update_with_the_kept_forward_is_the_same_update(kind, entropy_coeff):
    torch.manual_seed(0)
    one = Counted(kind)
    torch.manual_seed(0)
    other = Counted(kind, keeps=False)
    other.module.load_state_dict(one.module.state_dict())
    found = one.update(given(), one.log_probs(given()), entropy_coeff)
    expected = other.update(given(), other.log_probs(given()), entropy_coeff)
    assert (one.forwards, one.engine.used_forwards) == (1, 1)
    assert (other.forwards, other.engine.used_forwards) == (2, 0)
    assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-8)
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_mlps_of_a_kept_forward_are_computed_again_as_they_were(monkeypatch):
    """The reference policy, whose adapters are off, is computed between the forward and its backward pass."""
    gradients = []
    for worth in (1 << 60, 0):
        monkeypatch.setattr(recompute, "WORTH", worth)
        torch.manual_seed(0)
        one = Counted()
        assert recompute.recompute_mlps(one.module) == 2
        old = one.log_probs(given())
        one.reference(given())
        gradients.append(one.update(given(), old)[1])
        assert one.engine.used_forwards == 1
    assert gradients[0].keys() == gradients[1].keys() != set()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_reference_policy_in_between_leaves_the_forward():
    one = Counted()
    old = one.log_probs(given())
    one.reference(given())
    one.update(given(), old)
    assert (one.forwards, one.engine.used_forwards) == (2, 1)


def test_a_forward_is_used_once():
    one = Counted()
    old = one.log_probs(given())
    for _ in range(2):
        one.update(given(), old)
    assert (one.forwards, one.engine.used_forwards) == (2, 1)


@pytest.mark.parametrize("what", ["tokens", "old log-probs", "rows", "a later forward", "more outputs"])
def test_another_batch_or_other_log_probs_get_their_own_forward(what):
    one = Counted()
    data, old = given(), one.log_probs(given())
    if what == "tokens":
        data = given(seed=1)
    elif what == "old log-probs":
        values = old.values().clone()
        values[2] = torch.nextafter(values[2], torch.tensor(0.0))
        old = jagged(values.split(old.offsets().diff().tolist()))
    elif what == "rows":
        order = torch.tensor([1, 0, 2, 3, 4, 5])
        data = tu.index_select_tensor_dict(data, order)
        old = jagged([old.unbind()[n] for n in order])
    elif what == "more outputs":
        tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
    else:  # for example with noise, to measure its effect
        next(p for n, p in one.module.named_parameters() if "norm" in n).data.mul_(1.1)
        one.log_probs(given())
    one.update(data, old)
    assert one.engine.used_forwards == 0


@pytest.mark.parametrize("what", ["part", "too long", "loss", "dropout"])
def test_no_graph_is_kept_where_the_update_computes_otherwise(what):
    one = Counted()
    data = given()
    if what == "too long":
        one.engine.engine_config.max_token_len_per_gpu = 10
    elif what == "dropout":
        one.engine.model_config.hf_config.attention_dropout = 0.1
    one.engine._rows = len(data) + (what == "part")
    loss = (lambda **_: (torch.zeros(()), {})) if what == "loss" else None
    with torch.no_grad():
        one.engine.forward_step(data, loss, forward_only=True)
    assert one.engine._kept is None


def test_dropout_is_recognised():
    config = make("llama").config
    assert not is_random_in_training(config)
    for name in ("attention_dropout", "router_jitter_noise", "embd_pdrop"):
        assert is_random_in_training(
            SimpleNamespace(get_text_config=lambda n=name: SimpleNamespace(to_dict=lambda: {n: 0.1}))
        )


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("data.train_batch_size=6", True),
        ("data.train_batch_size=12", False),
        ("actor_rollout_ref.actor.ppo_epochs=2", False),
        ("actor_rollout_ref.model.enable_gradient_checkpointing=true", False),
        ("trainer.n_gpus_per_node=2", False),
        ("critic.enable=true", False),
        ("algorithm.rollout_correction.bypass_mode=true", False),
    ],
)
def test_recipes_whose_batch_is_one_mini_batch_keep_the_forward(override, kept):
    config = load_recipe("e12", ["profile=cpu", "experiment=embedded", override])
    assert keeps_forward(config) == kept
    tell_workers(config)
    assert OmegaConf.select(config, f"actor_rollout_ref.model.override_config.{kept_forward.KEPT}") == (kept or None)
