"""Complete checkpoints: a step is recorded before it is saved, and only undamaged checkpoints are loaded."""

import json
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.core_algos import AdaptiveKLController
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_aqn.errors import DataError
from verl_aqn.runs.checkpoints import WRITING, damage_of, newest_whole, point_to, publish, saving, weights_only
from verl_aqn.runs.folder import RunFolder

PUT_BACK, KL_COEF = "put_back.json", "kl_coef.json"


class SavingTrainer(PPOTrainerSync):
    """A trainer that saves a checkpoint at the end of a step.

    verl saves before it validates and before it writes the metrics. A run that is killed in between would resume after
    a step without metrics, and would never validate the last step. Here saving comes last.
    """

    checkpoint_callback: CheckpointCallback
    folder: RunFolder
    save_due = False
    put_back: deque[int] = deque()  # noqa: RUF012  replaced, and never added to
    """Rows of the data that were taken and must be taken again; the saved position of verl's loader is after them."""
    kl_ctrl_in_reward: Any = None  # verl's, if the recipe has algorithm.use_kl_in_reward

    def _save_checkpoint(self):
        self.save_due = True

    def save(self) -> None:
        """Save a checkpoint. Call this if `save_due`, after the step's metrics and validation are recorded."""
        self.save_due, began = False, time.monotonic()
        trainer = self.config.trainer
        place, was = Path(trainer.default_local_dir), trainer.copy()
        shutil.rmtree(place / WRITING, ignore_errors=True)  # left by an attempt that was killed during a save
        # verl deletes old checkpoints by their first paths, but `publish` moves them; therefore `publish` deletes too.
        aside = {"default_local_dir": str(place / WRITING)}
        trainer.merge_with(aside | {"max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None})
        # The user's callback is called after the checkpoint has been moved to its final place.
        callback = self.checkpoint_callback
        self.checkpoint_callback = CheckpointCallback()
        written = place / WRITING / f"global_step_{self.global_steps}"
        with saving(written):
            try:
                super()._save_checkpoint()
            finally:
                self.checkpoint_callback = callback
                trainer.merge_with(was)
            (written / PUT_BACK).write_text(json.dumps(list(self.put_back)))
            if isinstance(self.kl_ctrl_in_reward, AdaptiveKLController):
                (written / KL_COEF).write_text(json.dumps(self.kl_ctrl_in_reward.value))
            size = publish(written, place, was.max_actor_ckpt_to_keep)
        shutil.rmtree(place / WRITING)
        seconds = time.monotonic() - began
        self.folder.append(
            "events.jsonl", {"kind": "checkpoint", "step": self.global_steps, "bytes": size, "seconds": seconds}
        )
        callback.on_save(
            trainer=self, global_step=self.global_steps, checkpoint_dir=str(place / written.name), async_save=False
        )

    def _load_checkpoint(self):
        trainer = self.config.trainer
        place = Path(trainer.default_local_dir)
        step, wrong = newest_whole(place) if trainer.resume_mode != "disable" else (0, [])
        for text in wrong:
            self.folder.append("events.jsonl", {"kind": "warning", "text": f"{text}: resuming from step {step}"})
        if step:
            point_to(place, step)
            trainer.resume_mode = "auto"  # resume_path sets where a run begins, not where it resumes
        elif trainer.resume_mode == "resume_path" and (damage := damage_of(Path(trainer.resume_from_path))):
            raise DataError(f"{damage}: use another checkpoint")
        with weights_only():
            super()._load_checkpoint()
        if self.global_steps:
            loaded = place / f"global_step_{step}" if step else Path(trainer.resume_from_path)
            if (file := loaded / PUT_BACK).exists():  # older checkpoints do not have this file
                self.put_back = deque(json.loads(file.read_text()))
            if isinstance(self.kl_ctrl_in_reward, AdaptiveKLController) and (file := loaded / KL_COEF).exists():
                self.kl_ctrl_in_reward.value = json.loads(file.read_text())
