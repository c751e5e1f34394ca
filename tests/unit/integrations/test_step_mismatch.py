"""What a step compares in bypass mode, where verl's update takes the rollout's log-probs for the trainer's."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.integrations.verl import batches
from verl_aqn.integrations.verl.noise_effect import TRAINER, UseOfNoise
from verl_aqn.integrations.verl.step_mismatch import ComparingTrainer

KEYS = ["1-0-5_0_0", "1-0-5_1_0"]
ROLLOUT, NOISY_TRAINER, CLEAN = -1.0, -1.2, -2.0  # log-probs of every token
BYPASS = "algorithm.rollout_correction.bypass_mode=true"


class Padded(dict):
    def to_padded_tensor(self):
        return self


@pytest.fixture
def trainer(monkeypatch):
    """`trainer(*overrides)`: a trainer with one batch in its queue; `records`: what it recorded, by kind."""
    queue = {"response_mask": torch.ones(2, 3), "rollout_log_probs": torch.full((2, 3), ROLLOUT)}

    def compute(self, batch, metrics):
        """Write what verl's own method writes."""
        bypass = self.config.algorithm.rollout_correction.bypass_mode
        self.forwards += not bypass
        queue["old_log_probs"] = torch.full((2, 3), ROLLOUT if bypass else NOISY_TRAINER)
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_compute_old_log_prob", compute)
    get = lambda select_fields, **_: Padded({name: queue[name] for name in select_fields if name in queue})  # noqa: E731
    monkeypatch.setattr(batches.transfer_queue, "kv_batch_get", get)

    def make(*overrides):
        made = ComparingTrainer.__new__(ComparingTrainer)
        made.config = load_recipe("grpo", ["profile=cpu", *overrides])
        OmegaConf.set_struct(made.config, False)
        made.aqn, made.use, made.mismatches, made.layout = parse_aqn(made.config), UseOfNoise([]), [], ""
        made.queue, made.records, made.forwards = queue, [], 0
        made.folder = SimpleNamespace(add_evidence=lambda record: made.records.append(record))
        made.check_record = lambda kind, record: None
        made.doing = made.event = made.warn = lambda text: None
        made.compared = made.told_uncompared = made.told_unpredicted = False
        return made

    return make


def step(trainer, number: int, sigma: float) -> dict[str, dict]:
    """Let the trainer take a step; return its records by kind."""
    trainer.global_steps, trainer.noise_metrics = number, {"aqn/sigma": sigma}
    trainer.queue.pop("old_log_probs", None)  # a step has a batch of its own
    trainer.clean_logp = {KEYS[0]: [CLEAN if sigma else ROLLOUT] * 3}
    trainer.records.clear()
    trainer._compute_old_log_prob(SimpleNamespace(keys=KEYS, tags=[{}, {}], partition_id="train"), {})
    return {record["kind"]: record for record in trainer.records}


def test_noise_in_rollout_and_actor_is_measured_in_bypass_mode_too(trainer):
    made = trainer("aqn.noise.apply_to=rollout+actor", BYPASS)
    assert step(made, 1, 0.0)["mismatch"]["source"] == "sampled"
    first = step(made, 2, 0.05)
    assert first["mismatch"]["abs_dlogp_mean"] == pytest.approx(ROLLOUT - NOISY_TRAINER)
    assert (first["use"]["predicted_by"], first["use"]["here"]) == (TRAINER, True)
    assert first["use"]["predicted"] == pytest.approx(NOISY_TRAINER - CLEAN)
    later = step(made, 3, 0.05)
    assert later["mismatch"]["source"] is None, "bypass mode saves the trainer's forward"
    assert (later["use"]["here"], later["use"]["predicted"]) == (False, pytest.approx(NOISY_TRAINER - CLEAN))
    assert made.forwards == 2
