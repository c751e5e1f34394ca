"""A gradient that is not finite: verl skips that update and goes on; our run stops and keeps the batch."""

import json
from types import SimpleNamespace

import pytest
import ray
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import nn

from verl_aqn.errors import TrainingError
from verl_aqn.integrations.verl import divergence
from verl_aqn.integrations.verl.engine import AqnFSDPEngine
from verl_aqn.runs.folder import open_run


def engine(gradient: float) -> AqnFSDPEngine:
    """verl's engine, as far as its optimiser step needs it, with one weight."""
    made = object.__new__(AqnFSDPEngine)
    made.module = nn.Linear(1, 1, bias=False)
    made.module.weight.grad = torch.full((1, 1), gradient)
    made.optimizer = torch.optim.SGD(made.module.parameters(), lr=1.0)
    made.optimizer_config = SimpleNamespace(clip_grad=1.0)
    made._qat_enabled = False
    return made


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_stops_the_run_and_changes_nothing(gradient):
    made = engine(gradient)
    before = made.module.weight.clone()
    with pytest.raises(TrainingError, match="not finite"):
        made.optimizer_step()
    assert torch.equal(made.module.weight, before)
    assert engine(0.5).optimizer_step() == 0.5


def test_its_batch_is_kept(tmp_path, monkeypatch):
    texts = torch.nested.as_nested_tensor([torch.tensor([1, 2, 3]), torch.tensor([4])], layout=torch.jagged)
    fields = {"responses": texts, "rm_scores": torch.tensor([1.0, 0.0]), "uid": ["a", "b"]}
    monkeypatch.setattr(divergence.transfer_queue, "kv_batch_get", lambda keys, partition_id: fields)
    run = open_run(tmp_path, OmegaConf.to_container(OmegaConf.create({})))
    batch = SimpleNamespace(keys=["a_0", "b_0"], partition_id="train")
    cause = TrainingError("the gradient is not finite")
    with (
        pytest.raises(TrainingError, match=r"step 7: the gradient is not finite \(its batch: .*diverged-7"),
        divergence.saved_where_it_diverges(batch, run, 7),
    ):
        raise ray.exceptions.RayTaskError("update_actor", "…", cause)
    with safe_open(run.path / "diverged-7.safetensors", "pt") as file:
        assert json.loads(file.metadata()["keys"]) == ["a_0", "b_0"]
        assert file.get_tensor("responses").tolist() == [1, 2, 3, 4]
        assert file.get_tensor("responses.offsets").tolist() == [0, 3, 4]
        assert file.get_tensor("rm_scores").tolist() == [1.0, 0.0]
    with pytest.raises(ray.exceptions.RayTaskError), divergence.saved_where_it_diverges(batch, run, 8):
        raise ray.exceptions.RayTaskError("update_actor", "…", ValueError("other"))
    assert not (run.path / "diverged-8.safetensors").exists()
