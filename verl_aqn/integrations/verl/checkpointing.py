"""verl's checkpoints, made whole: a step is on record before it is saved, and what is loaded is what was saved."""

import json
import shutil
import time
from collections import deque
from pathlib import Path

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_aqn.errors import DataError
from verl_aqn.runs.checkpoints import WRITING, damage_of, newest_whole, point_to, publish, weights_only
from verl_aqn.runs.folder import RunFolder

PUT_BACK = "put_back.json"


class SavingTrainer(PPOTrainerSync):
    """verl saves within a step, before it validates and before its metrics are written: a run that is killed there
    would resume after a step of which nothing is known, and never validate the last one. Here saving comes last.
    """

    checkpoint_callback: CheckpointCallback
    folder: RunFolder
    save_due = False
    put_back: deque[int] = deque()  # noqa: RUF012  replaced, and never added to
    """Rows of the data that were taken and are to be taken again: verl's loader, whose place is saved, is past them."""

    def _save_checkpoint(self):
        self.save_due = True

    def save(self) -> None:
        """To be called where `save_due`, once the step's metrics and validation are on record."""
        self.save_due, began = False, time.monotonic()
        trainer = self.config.trainer
        place, was = Path(trainer.default_local_dir), trainer.copy()
        shutil.rmtree(place / WRITING, ignore_errors=True)  # of an attempt that was killed at it
        # verl forgets old checkpoints by the paths that it wrote to, and `publish` moves them: it does both.
        aside = {"default_local_dir": str(place / WRITING)}
        trainer.merge_with(aside | {"max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None})
        # The user's callback is told of the checkpoint once it has its place.
        callback = self.checkpoint_callback
        self.checkpoint_callback = CheckpointCallback()
        super()._save_checkpoint()
        self.checkpoint_callback = callback
        trainer.merge_with(was)
        written = place / WRITING / f"global_step_{self.global_steps}"
        (written / PUT_BACK).write_text(json.dumps(list(self.put_back)))
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
            self.folder.append("events.jsonl", {"kind": "warning", "text": f"{text}: going back to step {step}"})
        if step:
            point_to(place, step)
            trainer.resume_mode = "auto"  # resume_path says where a run begins, not where it goes on
        elif trainer.resume_mode == "resume_path" and (damage := damage_of(Path(trainer.resume_from_path))):
            raise DataError(f"{damage}: name another checkpoint")
        with weights_only():
            super()._load_checkpoint()
        if self.global_steps:
            loaded = place / f"global_step_{step}" if step else Path(trainer.resume_from_path)
            if (file := loaded / PUT_BACK).exists():  # older checkpoints have none
                self.put_back = deque(json.loads(file.read_text()))
