"""How verl counts RL steps, on which `check_steps` rests."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_aqn.errors import ConfigError
from verl_aqn.prepare import check_steps


def trainer(steps, rows=20, epochs=2, batch=6, filtering=True):
    """verl's trainer with its own `_init_dataloader`, in front of data sets that are already there."""
    from verl.trainer.ppo.v1 import trainer_base

    from verl_aqn.verl_api.trainer import AqnTrainer

    made = AqnTrainer.__new__(AqnTrainer)
    made.config = OmegaConf.create(
        {
            "data": {
                "train_files": "a", "val_files": "a", "train_batch_size": batch, "gen_batch_size": None,
                "val_batch_size": None, "dataloader_num_workers": 0, "shuffle": True, "seed": 1,
            },
            "trainer": {"total_epochs": epochs, "total_training_steps": steps, "v1": {"sampler": {}}},
            "algorithm": {"filter_groups": {"enable": filtering, "max_num_gen_batches": 10}},
            "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": batch, "optim": {}}},
            "aqn": {},
        }
    )  # fmt: skip
    made.tokenizer = made.processor = None
    made.tell_rows = lambda: None  # there are no files
    made.trainer_mode, made.parameter_sync_step = "sync", 1
    return made, trainer_base, [SimpleNamespace(index=i) for i in range(rows)]


@pytest.mark.parametrize("filtering", [False, True])
@pytest.mark.parametrize("steps", [None, 4, 6])
def test_verl_takes_the_steps_that_check_steps_says(steps, filtering, monkeypatch):
    made, base, rows = trainer(steps, filtering=filtering)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    made._init_dataloader()
    assert made.total_training_steps == check_steps(made.config, len(rows)) == (steps or 6)
    assert made.steps_per_epoch == 3
    assert made.train_dataloader.batch_size == (1 if filtering else 6)


def test_rows_that_verl_drops_are_told_in_the_trainer(monkeypatch):
    """The file had rows enough; of those that are left after filtering verl would stop early and not validate."""
    made, base, rows = trainer(6, rows=17)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(ConfigError, match=r"17 training rows that are left .* give 4 steps in 2 epoch"):
        made._init_dataloader()


def test_a_loader_at_its_end_starts_over_so_that_dropped_groups_cost_no_step(monkeypatch):
    made, base, rows = trainer(6, filtering=True)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    made._init_dataloader()
    monkeypatch.setattr(base.tu, "get_tensordict", lambda batch: batch)
    made.train_dataloader.collate_fn = lambda batch: {"raw_prompt": batch}
    made.train_dataloader_it = None
    drawn = [made._fetch_one_gen_batch()["raw_prompt"][0].index for _ in range(50)]
    assert sorted(drawn[:20]) == sorted(drawn[20:40]) == list(range(20))
