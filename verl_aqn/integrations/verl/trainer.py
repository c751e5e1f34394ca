"""verl's synchronous trainer with noise by schedule, and evidence of everything that reaches the rollout.

σ is decided in one place, `on_step_begin` in this module: by the schedule, or by `aqn.noise.control`. The rollout gets
the noise order, and its answer is checked at once.
"""

from dataclasses import asdict
from typing import Any

import ray
from verl.trainer.ppo.utils import Role
from verl.utils.debug import marked_timer

import verl_aqn.integrations.verl.rollout  # noqa: F401  registers the replica
from verl_aqn.integrations.verl import tripwire
from verl_aqn.integrations.verl.batches import fields_of, real_keys
from verl_aqn.integrations.verl.divergence import saved_where_it_diverges
from verl_aqn.integrations.verl.failures import answered
from verl_aqn.integrations.verl.figures import cut_share, drop_meaningless, numbers_in
from verl_aqn.integrations.verl.groups import AqnReplayBuffer, check_refill, count_groups, remedy
from verl_aqn.integrations.verl.left_out_rows import rows_of, told_rows
from verl_aqn.integrations.verl.micro_batches import settle_critic
from verl_aqn.integrations.verl.step_mismatch import ComparingTrainer
from verl_aqn.integrations.verl.token_mismatch import can_rescore, clip_range, scored_again, step_metrics
from verl_aqn.integrations.verl.workers import AqnActorWorker, AqnTrainingWorker
from verl_aqn.preflight.prepare import check_steps
from verl_aqn.preflight.run_data import data_files
from verl_aqn.runs.folder import folder_of
from verl_aqn.runs.judge.records import END, VALIDATION
from verl_aqn.runs.phases import TRACKERS


class AqnTrainer(ComparingTrainer):
    """The trainer of a run. It writes its records to the run folder."""

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            cls = AqnTrainingWorker if role == Role.Critic else AqnActorWorker
            self.role_worker_mapping[role] = ray.remote(cls)
        settle_critic(self.config.critic)

    def _init_dataloader(self):
        with told_rows(self.config):
            super()._init_dataloader()
        self.tell_rows()
        left = " that remain of the file (too long ones are filtered)"
        assert check_steps(self.config, len(self.train_dataset), left) == self.total_training_steps

    def _build_replay_buffer(self):
        buffer = super()._build_replay_buffer()
        buffer.__class__ = AqnReplayBuffer
        buffer.on_failure = self.refuse_failed
        buffer.folder = folder_of(self.config)
        buffer.begin()  # prompts are added before the first sample is taken
        buffer.poll_interval = 0.1  # verl checks for finished responses only every 2 s
        return buffer

    def _add_prompts_to_generate(self, num_prompts):
        buffer, sigma = self.replay_buffer, self.noise_metrics.get("aqn/sigma", 0.0)
        check_refill(buffer.thrown_away, buffer.failed, self.config, self.global_steps, sigma)
        return super()._add_prompts_to_generate(num_prompts)

    def _submit_batch_to_rollout(self, *args, **kwargs):
        self.doing("generation")  # also for a refill of discarded groups, so that the watchdog sees progress
        count = super()._submit_batch_to_rollout(*args, **kwargs)
        self.requested += count * self.config.actor_rollout_ref.rollout.n
        return count

    def on_init_end(self):
        self.event("rollout ready")
        self.begin_evidence()
        super().on_init_end()  # wakes the replicas, which verl put to sleep, and sends the adapter
        self.check_start()

    def on_step_begin(self):
        self.doing("noise")
        self.requested = 0
        super().on_step_begin()
        self.apply_noise(self.global_steps - 1)

    def on_sample_end(self):
        rollout = self.config.actor_rollout_ref.rollout
        requested = self.config.data.train_batch_size * rollout.n
        taken = self.replay_buffer.taken.keys
        failed = requested - answered(taken)
        self.tell_failed("train", requested, failed)
        self.noise_metrics["aqn/answers_failed"] = failed
        keys = scored_again(taken, self.aqn.mismatch.rescore if can_rescore(rollout) else 0)
        sigma = self.noise_metrics["aqn/sigma"]
        if not self.compared and tripwire.source_of(rollout, sigma, self.aqn.noise.in_actor) == "rescored":
            keys = scored_again(taken, max(1, len(taken) // tripwire.FIRST_SAMPLES))
        with marked_timer("rescore", self.timing_raw):
            self.clean_logp = self.score_without_noise(keys) if keys else {}
        super().on_sample_end()  # puts the rollout to sleep if the device supports it
        if self.aqn.noise.in_actor:
            self.apply_actor_noise(self.global_steps - 1)

    def _step_once(self, metrics, timing_raw, sample_batch_size):
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        if self.aqn.noise.in_actor:
            self.restore_actor()
        return batch

    def _update_critic(self, batch, metrics):
        self.doing("critic's update")
        with saved_where_it_diverges(batch, self.folder, self.global_steps):
            return super()._update_critic(batch, metrics)

    def _update_actor(self, batch, metrics):
        self.doing("update")
        with saved_where_it_diverges(batch, self.folder, self.global_steps):
            return super()._update_actor(batch, metrics)

    def on_step_end(self):
        self.doing("sync")
        super().on_step_end()
        self.check_adapter()

    def on_validate_begin(self):
        self.event(f"validating after step {self.global_steps}")
        self.doing("validation")
        self.restore_clean(VALIDATION)
        super().on_validate_begin()

    def on_validate_end(self):
        super().on_validate_end()
        self.doing(TRACKERS)  # verl sends the validation before training to them next

    def fit(self, agent_loop_manager):
        super().fit(agent_loop_manager)
        self.doing("base")
        self.restore_clean(END)
        self.check_base("end")
        self.doing("evidence")
        peaks = {"actor": self.actor_rollout_wg.memory_peak(), "rollout": self.rollout("aqn_memory_peak")}
        self.write("events.jsonl", kind="memory", **peaks)
        self.check_all_evidence()

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        self.doing("metrics")
        timing_raw.pop("save_checkpoint", None)  # the checkpoint is saved later
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        metrics.update(self.noise_metrics)
        metrics["aqn/synced_bytes"] = self.synced_bytes
        metrics.update(self.group_and_mismatch_metrics(batch, metrics))
        metrics.update(self.follow_target(global_steps - 1, metrics))
        drop_meaningless(metrics, cpu=self.config.trainer.device == "cpu")
        numbers, total = numbers_in(metrics), self.total_training_steps
        self.write("metrics.jsonl", kind="step", step=global_steps, total=total, metrics=numbers)
        if self.save_due:
            self.doing("checkpoint")
            self.save()
        self.doing(TRACKERS)  # verl sends the metrics to them next

    def group_and_mismatch_metrics(self, batch: Any, metrics: dict) -> dict[str, float]:
        """Return `aqn/groups…` and `aqn/mismatch/…` of a step; token_mismatch.py explains each figure."""
        keys = real_keys(batch)
        fields = ["responses", "rm_scores", "loss_mask", "rollout_log_probs", "old_log_probs", "entropy"]
        data = fields_of(batch, fields)
        lengths = data["responses"].offsets().diff()
        data = data.to_padded_tensor()
        # verl has taken the tokens that rollout_correction.rollout_rs rejects out of response_mask, for their mismatch.
        data["response_mask"] = data.pop("loss_mask")
        rewards = data["rm_scores"].sum(dim=1).tolist()
        groups, flat = count_groups([key.rsplit("_", 2)[0] for key in keys], rewards)
        if groups and flat == groups and not self.use_critic:
            sigma, mean = self.noise_metrics["aqn/sigma"], sum(rewards) / len(rewards)
            self.warn(
                f"step {self.global_steps}: the rewards differ in no group, so there is no gradient (σ {sigma:g}, "
                f"mean reward {mean:.3f}): {remedy(sigma, mean, self.aqn.noise)}"
            )
        refused = self.replay_buffer.thrown_away.total()
        groups += refused + int(metrics.get("training/filter_groups/discarded_surplus_samples", 0))
        found = {"aqn/groups": groups, "aqn/groups_without_variance": flat + refused}
        if self.config.actor_rollout_ref.rollout.multi_turn.enable:
            found["aqn/tool_tokens"] = (lengths.sum().item() - data["response_mask"].sum().item()) / len(keys)
        found["response_length/clip_ratio"] = cut_share(lengths, self.config.data.max_response_length)
        # In bypass mode old_log_probs are a copy of the rollout's, so the mismatch would be 0.
        if not self.bypasses and {"rollout_log_probs", "old_log_probs", "entropy"} <= set(data.keys()):
            clip = clip_range(self.config.actor_rollout_ref.actor)
            # With top_p or top_k, log-probs that were scored only for the mismatch check are not comparable here.
            rescored = self.clean_logp if can_rescore(self.config.actor_rollout_ref.rollout) else {}
            found |= step_metrics(data, keys, rescored, clip, self.aqn.noise.in_actor)
        return found

    def tell_rows(self) -> None:
        """Record and report how many rows of both sets' files are used and left out."""
        sets = {"train": (self.train_dataset, "training data"), "val": (self.val_dataset, "validation data")}
        for part, (dataset, name) in sets.items():
            rows = rows_of(dataset, [str(file) for file in data_files(self.config, f"{part}_files")])
            self.write("events.jsonl", kind="rows", set=part, **asdict(rows))
            (self.warn if rows.failed else self.event)(f"{name}: {rows.text}")
