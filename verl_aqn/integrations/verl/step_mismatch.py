"""Comparison of log-probs in each step: the train–rollout mismatch, and whether the rollout uses its noise."""

import math
from dataclasses import asdict
from typing import Any

import ray
import torch
import transfer_queue
from omegaconf import DictConfig

from verl_aqn.config.noise_settings import order_of
from verl_aqn.integrations.verl import tripwire
from verl_aqn.integrations.verl.batches import fields_of, real_keys
from verl_aqn.integrations.verl.noise_effect import TRAINER, UseOfNoise
from verl_aqn.integrations.verl.proving import ProvingTrainer
from verl_aqn.integrations.verl.token_mismatch import can_rescore, clip_range
from verl_aqn.runs.folder import EVIDENCE
from verl_aqn.runs.judge.noise_use import falls_short
from verl_aqn.runs.judge.records import RESCORING


class ComparingTrainer(ProvingTrainer):
    """A trainer that compares the log-probs of a step's samples by trainer and rollout, with and without noise."""

    def __init__(self, config: DictConfig):
        super().__init__(config)
        self.clean_logp: dict[str, list[float]] = {}  # the rollout's samples, scored again without noise
        # Mean |Δ log-prob| between trainer and rollout in each compared step, with the earlier attempts first.
        evidence = list(self.folder.read(EVIDENCE))
        self.mismatches: list[float] = [
            record["abs_dlogp_mean"] for record in evidence if record["kind"] == "mismatch" and record.get("source")
        ]
        self.use = UseOfNoise(evidence)
        self.compared = self.told_uncompared = self.told_unpredicted = False  # in this attempt

    @property
    def bypasses(self) -> bool:
        """Return whether the rollout's log-probs are the `old_log_probs` of the update, instead of the trainer's."""
        correction = self.config.algorithm.rollout_correction
        return bool(correction and correction.get("bypass_mode"))

    def _compute_old_log_prob(self, batch, metrics):
        self.doing("log-probs")
        noisy = self.log_probs_with_noise(batch)
        if self.bypasses:
            if self.compared and noisy is None and not self.measures_actor():
                self.uncompared("algorithm.rollout_correction.bypass_mode=true uses the rollout's log-probs")
            else:  # the trainer's log-probs are computed only for these checks
                self.check_mismatch(self.trainer_log_probs(batch))
            self.check_use(batch, noisy)
            return super()._compute_old_log_prob(batch, metrics)
        batch = super()._compute_old_log_prob(batch, metrics)
        self.check_mismatch(batch)
        self.check_use(batch, noisy)
        return batch

    def score_without_noise(self, keys: list[str]) -> dict[str, list[float]]:
        """Return the log-probs that the rollout, with this step's adapter and clean norms, gives to its responses."""
        self.restore_clean(RESCORING)
        data = transfer_queue.kv_batch_get(keys=keys, partition_id="train", select_fields=["prompts", "responses"])
        servers, requests = self.servers(), []
        longest = self.config.actor_rollout_ref.rollout.max_model_len - 1  # the engine needs room for one more token
        for n, (prompt, response) in enumerate(zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True)):
            tokens = [*prompt.tolist(), *response.tolist()]
            params = {"prompt_logprobs": 0, "max_tokens": 1}
            request = servers[n % len(servers)].generate.remote(tokens[:longest], params, f"score-{keys[n]}")
            requests.append((keys[n], len(prompt), request))
        found = {}
        for key, start, request in requests:
            scores = ray.get(request).extra_fields["prompt_logprobs"]  # of tokens 1, 2, …; the last one is padding
            found[key] = [score for (score,) in scores[start - 1 : -1]]
        return found

    def check_mismatch(self, batch: Any) -> None:
        """Compare the trainer's log-probs of this step with the rollout's, before the update uses them."""
        actor_rollout, sigma = self.config.actor_rollout_ref, self.noise_metrics["aqn/sigma"]
        source = tripwire.source_of(actor_rollout.rollout, sigma, self.aqn.noise.in_actor)
        if source is None:
            reason = f"temperature {actor_rollout.rollout.temperature:g}, top_p {actor_rollout.rollout.top_p:g}"
            self.uncompared(f"{reason}, σ {sigma:g}")
            if not self.mismatches and not self.told_uncompared:
                self.told_uncompared = True  # warn only once
                self.warn(
                    f"step {self.global_steps}: log-probs of trainer and rollout cannot be compared ({reason}, σ "
                    f"{sigma:g}): a mismatch stays unnoticed until a step in which they can be compared"
                )
            return
        fields = ["response_mask", "old_log_probs", *(["rollout_log_probs"] if source == "sampled" else [])]
        data, clip = fields_of(batch, fields).to_padded_tensor(), clip_range(actor_rollout.actor)
        found = tripwire.measure(data, real_keys(batch), self.clean_logp, source, clip)
        if found is None:
            self.uncompared("no sample was scored again without noise (aqn.mismatch.rescore)")
            return
        limits = self.aqn.mismatch
        bounds = {key: value if math.isfinite(value) else "none" for key, value in asdict(limits).items()}
        record = {"step": self.global_steps, "warn": bounds["warn"], "stop": bounds["stop"], **found}
        self.folder.add_evidence({"kind": "mismatch", **record})
        text = tripwire.judge(found, self.global_steps, self.mismatches, limits, self.layout)  # with likely causes
        self.check_record("mismatch", record)
        if text:
            self.warn(text)
        elif not self.compared:
            self.event(
                f"trainer and rollout within {found['abs_dlogp_mean']:.2g} nats per token ({found['tokens']:,} tokens)"
            )
        self.compared = True
        self.mismatches.append(found["abs_dlogp_mean"])

    def uncompared(self, reason: str) -> None:
        """Record that the log-probs of this step are not compared, with the reason."""
        self.record("mismatch", step=self.global_steps, source=None, reason=reason)

    def trainer_log_probs(self, batch: Any) -> Any:
        """Compute the trainer's own log-probs, also in bypass mode, and return the batch with them."""
        if not self.bypasses:
            return super()._compute_old_log_prob(batch, {})
        correction = self.config.algorithm.rollout_correction
        correction.bypass_mode = False
        batch = super()._compute_old_log_prob(batch, {})
        correction.bypass_mode = True
        return batch

    def log_probs_with_noise(self, batch: Any, again: bool = False) -> torch.Tensor | None:
        """Compute the trainer's log-probs [B, R] with the rollout's noise, in the first step with noise or if `again`.

        They replace the log-probs without noise in the batch. Return None in other steps, and if the actor cannot carry
        this noise.
        """
        sigma, done = self.noise_metrics["aqn/sigma"], self.use.by == TRAINER and not again
        if self.aqn.noise.in_actor or sigma == 0 or done or not self.use_can_be_seen():
            return None
        order = order_of(self.aqn.noise, self.schedule, self.global_steps - 1)
        reason = next(filter(None, self.actor_rollout_wg.cannot_carry_noise(order.to_dict())), "")
        if not reason:
            ranks = self.actor_rollout_wg.apply_noise(order.to_dict())
            if {one["weights_digest"] for one in ranks} == {self.rollout_noise["rollout rank 0"]["weights_digest"]}:
                self.trainer_log_probs(batch)
                noisy = fields_of(batch, ["old_log_probs"]).to_padded_tensor()["old_log_probs"]
                if all(one["uses"] for one in self.actor_rollout_wg.restore_clean()):
                    return noisy
                reason = "its forward did not use the noise"
            else:
                self.actor_rollout_wg.restore_clean()
                reason = "its norms with noise differ from the rollout's"
        if not self.told_unpredicted:
            self.told_unpredicted = True
            self.warn(
                f"the effect of noise was not measured in the actor ({reason}): a rollout that ignores its noise may "
                "go unnoticed"
            )
        return None

    def measures_actor(self) -> bool:
        """Return whether this is the first step in which the actor's own noise shows what the rollout's should do."""
        sigma, done = self.noise_metrics["aqn/sigma"], self.use.by == TRAINER
        return self.aqn.noise.in_actor and sigma > 0 and not done and self.use_can_be_seen()

    def use_can_be_seen(self) -> bool:
        """Return whether samples of this step were scored again and can be compared."""
        return bool(self.clean_logp) and can_rescore(self.config.actor_rollout_ref.rollout)

    def check_use(self, batch: Any, noisy_trainer: torch.Tensor | None) -> None:
        """Check that this step's noise moved the rollout's log-probs, if some of its samples were scored again."""
        if not self.use_can_be_seen():
            return
        sigma, noisy = self.noise_metrics["aqn/sigma"], self.aqn.noise.in_actor
        # In bypass mode the trainer's log-probs exist only if a comparison needed them.
        trainer = ["old_log_probs"] if noisy_trainer is not None or noisy else []
        data = fields_of(batch, ["response_mask", "rollout_log_probs", *trainer]).to_padded_tensor()
        if noisy and sigma:
            noisy_trainer = data.get("old_log_probs", None)
        mismatch = self.mismatches[-1] if self.mismatches else 0.0
        told = (real_keys(batch), self.clean_logp, sigma, mismatch)
        found = self.use.measure(data, *told, noisy_trainer)
        if found and not found["here"] and falls_short(found):
            # The prediction is scaled from another step: measure the effect in this step before it may stop the run.
            noisy_trainer = self.log_probs_with_noise(batch, again=True)
            if noisy_trainer is not None:
                self.trainer_log_probs(batch)  # without noise, as before
                data = fields_of(batch, ["response_mask", "rollout_log_probs", "old_log_probs"]).to_padded_tensor()
                found = self.use.measure(data, *told, noisy_trainer)
        if found:
            self.record("use", step=self.global_steps, **found)
