"""Check that recipes/minimal.py learns, leaves its base alone, and has noise only while the policy explores."""

import importlib.util
from pathlib import Path

import pytest
import torch

from verl_aqn.mxfp4 import Mxfp4Linear

STEPS = 14


@pytest.fixture(scope="module")
def minimal():
    path = Path(__file__).resolve().parents[2] / "recipes" / "minimal.py"
    spec = importlib.util.spec_from_file_location("minimal", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trainer(minimal, tmp_path_factory):
    return minimal.make_trainer("tiny", tmp_path_factory.mktemp("model"), STEPS)


def snapshot(model, wanted) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if wanted(name)}


def is_norm(name: str) -> bool:
    return "norm" in name


def is_adapter(name: str) -> bool:
    return "lora_" in name


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[bool]:
    return [torch.equal(weight, other[name]) for name, weight in one.items()]


def test_the_page_learns_and_only_the_adapter_changes(minimal, trainer, monkeypatch, capsys):
    model, respond, log_probs, seen = trainer.model, trainer.respond, trainer.log_probs, []

    def watched(act, what):
        def call(*arguments, **how):
            seen.append((what or ("explore" if how["do_sample"] else "validate"), snapshot(model, is_norm)))
            return act(*arguments, **how)

        return call

    monkeypatch.setattr(trainer, "respond", watched(respond, None))
    monkeypatch.setattr(trainer, "log_probs", watched(log_probs, "update"))
    base = snapshot(model, lambda name: not is_adapter(name))
    adapter = snapshot(model, is_adapter)
    packed = [name for name in base if name.endswith(("weight_packed", "weight_scale"))]
    assert sum(isinstance(module, Mxfp4Linear) for module in model.modules()) == 14  # seven a layer
    assert len(packed) == 28

    rewards = minimal.train(trainer, STEPS)

    # The packed bytes, and all that is not the adapter, are what they were; the adapter is not.
    assert all(equal(base, snapshot(model, lambda name: not is_adapter(name))))
    assert not any(equal(adapter, snapshot(model, is_adapter)))
    # No noise in the warm-up, noise on every norm in every later rollout, none in updates and validations.
    clean = {name: weight for name, weight in base.items() if is_norm(name)}
    assert len(clean) == 5
    explored = [equal(norms, clean) for what, norms in seen if what == "explore"]
    warm_up = minimal.PROMPTS * sum(trainer.schedule.sigma(step) == 0 for step in range(STEPS))
    assert 0 < warm_up < len(explored) == minimal.PROMPTS * STEPS
    assert all(all(same) for same in explored[:warm_up])
    assert not any(any(same) for same in explored[warm_up:])
    assert {what for what, _ in seen} == {"explore", "update", "validate"}
    assert all(all(equal(norms, clean)) for what, norms in seen if what != "explore")
    # Noise fades: the last rollout's norms are nearer to the clean ones than the first noisy one's.
    noisy = [norms for what, norms in seen if what == "explore"][warm_up:]
    first, last = (max((norms[name] - clean[name]).abs().max() for name in clean) for norms in (noisy[0], noisy[-1]))
    assert first > 0.05 > 1e-3 > last > 0
    # It learns.
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == STEPS + 2
    assert lines[1].startswith("step  1/14  σ 0.00e+00  reward 0.")


def test_a_token_behind_the_end_of_a_response_does_not_count(minimal, trainer, monkeypatch):
    eos = trainer.tokenizer.eos_token_id

    def ends(input_ids, **how):
        return torch.cat([input_ids, torch.tensor([[5, eos, eos, 7]])], 1)

    monkeypatch.setattr(trainer.model, "generate", ends)
    _, mask, _ = trainer.respond(minimal.problems(1, "train", 0)[0], do_sample=False)
    assert mask.tolist() == [[1, 1, 0, 0]]


def test_it_is_one_page_without_a_host(minimal):
    source = Path(minimal.__file__).read_text()
    assert len(source.splitlines()) <= 130
    assert not [line for line in source.splitlines() if line.startswith(("import ", "from ")) and "verl." in line]
