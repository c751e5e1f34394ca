"""The step at which verl's trainer starts or resumes, by its own loading of existing checkpoints."""

from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_kl_controller

from tests.helpers.full_disk import full_disk
from verl_aqn.errors import ConfigError, DataError, EnvironmentFault
from verl_aqn.runs.checkpoints import damage_of, publish
from verl_aqn.runs.folder import RunFolder


def write(checkpoints, step):
    folder = checkpoints / ".writing" / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    torch.save({"step": step}, folder / "data.pt")
    publish(folder, checkpoints, None)
    return checkpoints / f"global_step_{step}"


@pytest.fixture
def trainer(tmp_path):
    """verl's trainer of a run in tmp_path that started from step 5 of another run; `loaded`: what it must load."""
    from verl_aqn.integrations.verl.checkpointing import SavingTrainer

    made, made_by = SavingTrainer.__new__(SavingTrainer), write(tmp_path / "other", 5)
    settings = {
        "resume_mode": "resume_path", "resume_from_path": str(made_by),
        "default_local_dir": str(tmp_path / "own"), "del_local_ckpt_after_load": False,
    }  # fmt: skip
    made.config = OmegaConf.create({"trainer": settings})
    made.folder, made.use_critic, made.trainer_mode, made.loaded = RunFolder(tmp_path), False, "sync", []
    made.actor_rollout_wg = SimpleNamespace(load_checkpoint=lambda local_path, **_: made.loaded.append(local_path))
    made.train_dataloader = SimpleNamespace(load_state_dict=lambda state: made.loaded.append(state["step"]))
    return made


def test_a_run_begins_from_the_checkpoint_that_it_names(trainer, tmp_path):
    trainer._load_checkpoint()
    assert trainer.global_steps == 5
    assert trainer.loaded == [str(tmp_path / "other/global_step_5/actor"), 5]


def test_a_run_that_died_goes_on_from_its_own(trainer, tmp_path):
    write(tmp_path / "own", 7)
    trainer._load_checkpoint()
    assert trainer.global_steps == 7
    assert trainer.loaded == [str(tmp_path / "own/global_step_7/actor"), 7]


def test_a_damaged_one_is_refused_where_the_run_has_none_of_its_own(trainer, tmp_path):
    (tmp_path / "other/global_step_5/data.pt").write_bytes(b"other")
    with pytest.raises(DataError, match="use another checkpoint"):
        trainer._load_checkpoint()


def test_a_run_that_is_not_to_resume_starts_from_scratch(trainer, tmp_path):
    write(tmp_path / "own", 7)
    trainer.config.trainer.resume_mode = "disable"
    trainer._load_checkpoint()
    assert (trainer.global_steps, trainer.loaded) == (0, [])


def saves(trainer):
    """Save what a checkpoint of step 3 takes from the trainer."""
    trainer.config.trainer.merge_with({"max_actor_ckpt_to_keep": 2, "max_critic_ckpt_to_keep": 2})
    trainer.config.trainer.default_hdfs_dir = None
    trainer.config.actor_rollout_ref = {"actor": {"checkpoint": {}}}
    trainer.checkpoint_callback = SimpleNamespace(on_save=lambda **_: None)
    trainer.actor_rollout_wg.save_checkpoint = lambda *_, **__: None
    trainer.train_dataloader.state_dict = lambda: {"step": 3}
    trainer.global_steps = 3
    return trainer


def test_a_user_s_callback_is_told_of_a_checkpoint_that_is_whole_and_in_its_place(trainer, tmp_path):
    told = []

    def on_save(trainer, global_step, checkpoint_dir, async_save, **_):
        assert damage_of(Path(checkpoint_dir)) == ""
        told.append((global_step, checkpoint_dir, async_save))

    saves(trainer).checkpoint_callback.on_save = on_save
    trainer.save()
    assert told == [(3, str(tmp_path / "own/global_step_3"), False)]
    trainer.global_steps = 4
    trainer.save()
    assert [step for step, *_ in told] == [3, 4]


def test_prompts_that_were_put_back_are_saved_with_a_checkpoint_and_taken_up_again(trainer, tmp_path):
    """verl saves the position of its loader, which is already past these prompts."""
    saves(trainer).put_back = deque([417, 5])
    trainer.save()
    trainer.put_back = deque()
    trainer._load_checkpoint()
    assert (trainer.global_steps, trainer.loaded[-1]) == (3, 3)
    assert list(trainer.put_back) == [417, 5]


def test_an_adaptive_kl_coefficient_is_saved_with_a_checkpoint_and_taken_up_again(trainer, tmp_path):
    """verl's checkpoints lack it, so the penalty of a resumed run would start over."""
    rule = OmegaConf.create({"type": "adaptive", "kl_coef": 0.001, "target_kl": 0.1, "horizon": 10_000})
    saves(trainer).kl_ctrl_in_reward = get_kl_controller(rule)
    trainer.kl_ctrl_in_reward.update(current_kl=0.2, n_steps=1000)
    reached = trainer.kl_ctrl_in_reward.value
    trainer.save()
    trainer.kl_ctrl_in_reward = get_kl_controller(rule)
    trainer._load_checkpoint()
    assert trainer.kl_ctrl_in_reward.value == reached == pytest.approx(0.00102)


def test_a_full_disk_is_told_as_one_and_the_checkpoint_before_stays(trainer, tmp_path):
    """torch says "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"."""
    saves(trainer).save()
    trainer.global_steps = 4
    trainer.train_dataloader.state_dict = lambda: {"step": torch.arange(10_000)}
    with full_disk(), pytest.raises(EnvironmentFault, match=r"global_step_4.* could not be written.*free some space"):
        trainer.save()
    assert damage_of(tmp_path / "own/global_step_3") == ""
    trainer.save()
    assert damage_of(tmp_path / "own/global_step_4") == ""


def test_a_full_disk_is_told_by_the_actor_too(tmp_path, monkeypatch):
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from verl_aqn.integrations.verl.packed_base import PackedBase

    def save(self, local_path, *_, **__):
        torch.save(torch.zeros(10_000), f"{local_path}/model.pt")

    monkeypatch.setattr(FSDPEngineWithLMHead, "save_checkpoint", save)
    with full_disk(), pytest.raises(EnvironmentFault, match=rf"{tmp_path} could not be written"):
        PackedBase.__new__(PackedBase).save_checkpoint(str(tmp_path))


def optimizer_of(lr, weight_decay=0.1):
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr, weight_decay=weight_decay)
    return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, step / 4))


@pytest.mark.parametrize(
    ("recipes", "words"),
    [((1e-5, 0.1), ""), ((1e-6, 0.1), "has lr 1e-05, but the recipe's has 1e-06"),
     ((1e-5, 0.0), "has weight_decay 0.1, but the recipe's has 0.0")],
)  # fmt: skip
def test_a_checkpoint_does_not_replace_the_recipe_s_optimizer_without_a_word(tmp_path, monkeypatch, recipes, words):
    """torch restores learning rate and weight decay with the state, and verl goes on with these."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from verl_aqn.integrations.verl.packed_base import PackedBase

    saved, schedule = optimizer_of(1e-5)
    schedule.step()
    torch.save([saved.state_dict(), schedule.state_dict()], tmp_path / "optim.pt")
    engine = PackedBase.__new__(PackedBase)
    engine.optimizer, engine.lr_scheduler = optimizer_of(*recipes)

    def load(self, local_path, *_, **__):
        states = torch.load(f"{local_path}/optim.pt")
        self.optimizer.load_state_dict(states[0])
        self.lr_scheduler.load_state_dict(states[1])

    monkeypatch.setattr(FSDPEngineWithLMHead, "load_checkpoint", load)
    if words:
        with pytest.raises(ConfigError, match=f"optimizer in {tmp_path} {words}: set the same"):
            engine.load_checkpoint(str(tmp_path))
    else:
        engine.load_checkpoint(str(tmp_path))


def test_a_checkpoint_of_an_older_version_put_nothing_back(trainer):
    trainer._load_checkpoint()
    assert not trainer.put_back
