"""How verl counts RL steps, which `check_steps` relies on."""

from collections import deque

import pytest
import torch
from omegaconf import OmegaConf

from verl_aqn.errors import ConfigError
from verl_aqn.preflight.prepare import check_steps
from verl_aqn.runs.request_seeds import StepPrompts


class Rows(torch.utils.data.Dataset):
    """A data set in the form that verl's trainer uses."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        return {"raw_prompt": [{"role": "user", "content": f"{item}?"}], "dummy": torch.zeros(1)}


def trainer(steps, rows=20, epochs=2, batch=6, filtering=True):
    """verl's trainer with its own `_init_dataloader` and data sets that already exist."""
    from verl.trainer.ppo.v1 import trainer_base

    from verl_aqn.integrations.verl.trainer import AqnTrainer

    made = AqnTrainer.__new__(AqnTrainer)
    made.config = OmegaConf.create(
        {
            "data": {
                "train_files": "a", "val_files": "a", "train_batch_size": batch, "gen_batch_size": None,
                "val_batch_size": None, "dataloader_num_workers": 0, "shuffle": True, "seed": 1,
                "custom_cls": {"path": None, "name": None},
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
    made.train_dataloader_it, made.prompts, made.global_steps = None, StepPrompts(), 1
    return made, trainer_base, Rows(rows)


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
    """The file has enough rows. With those left after filtering, verl would stop early and not validate."""
    made, base, rows = trainer(6, rows=17)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(ConfigError, match=r"17 training rows that remain .* give 4 steps in 2 epoch"):
        made._init_dataloader()


def prompts_of(batch):
    """Return name, uid and text of each prompt of a batch."""
    texts = [prompt[0]["content"] for prompt in batch["raw_prompt"]]
    return list(zip(batch["aqn_prompt"], batch["uid"], texts, strict=True))


def test_a_loader_at_its_end_starts_over_so_that_dropped_groups_cost_no_step(monkeypatch):
    made, base, rows = trainer(6, filtering=True)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    made._init_dataloader()
    drawn = [prompts_of(made._fetch_one_gen_batch())[0] for _ in range(50)]
    names, uids, texts = zip(*drawn, strict=True)
    assert sorted(texts[:20]) == sorted(texts[20:40]) == sorted(f"{row}?" for row in range(20))
    assert [name.partition("+")[0] + "?" for name in names] == list(texts)
    assert len(set(names)) == len(set(uids)) == 50, "a row that comes again in a step has another name"


@pytest.mark.parametrize("filtering", [False, True])
def test_prompts_have_the_names_of_their_rows_in_the_order_of_the_data(filtering, monkeypatch):
    made, base, rows = trainer(6, filtering=filtering)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    made._init_dataloader()
    found = []
    for made.global_steps in (1, 2):
        batch = made._next_train_batch()
        assert len(batch) == 6
        found += prompts_of(batch)
    assert [uid for _, uid, _ in found] == [f"{1 + n // 6}-{n % 6}-{name}" for n, (name, _, _) in enumerate(found)]
    assert [f"{name}?" for name, _, _ in found] == [text for _, _, text in found]


def test_what_is_put_back_comes_first_and_again_by_its_row(monkeypatch):
    made, base, rows = trainer(6, filtering=True)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    made._init_dataloader()
    first = prompts_of(made._next_train_batch(6))
    made.put_back = deque(made.prompts.after(3))
    made.global_steps = 2
    then = prompts_of(made._next_train_batch(6))
    assert [text for _, _, text in then[:2]] == [text for _, _, text in first[4:]]
    assert len({text for _, _, text in first[:4] + then}) == 10, "nothing else comes twice"
    assert [uid.split("-")[1] for _, uid, _ in then] == list("012345")
    assert not made.put_back


def test_the_validation_set_tells_its_rows_too(monkeypatch):
    made, base, rows = trainer(6)
    monkeypatch.setattr(base, "create_rl_dataset", lambda *args, **kwargs: rows)
    made.config.data.validation_shuffle = True
    made._init_dataloader()
    (batch,) = made.val_dataloader
    texts = [prompt[0]["content"] for prompt in batch["raw_prompt"]]
    assert texts == [f"{row}?" for row in batch["aqn_prompt"]] != [f"{row}?" for row in range(20)]
