"""verl's synchronous trainer with noise by schedule, and evidence of everything that reaches the rollout.

One place decides σ: `on_step_begin` here. The rollout is told, and what it answers is checked there and then.
"""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue
from omegaconf import DictConfig
from verl.trainer.ppo.utils import Role
from verl.utils.debug import marked_timer

import verl_aqn.verl_api.rollout  # noqa: F401  registers the replica
from verl_aqn.config import order_of, parse_aqn, schedule_of
from verl_aqn.errors import EvidenceError
from verl_aqn.judge.base import sentence
from verl_aqn.judge.records import END, RESCORING, VALIDATION, VERSION, Judge
from verl_aqn.noise import expected_norms
from verl_aqn.prepare import check_steps, data_files
from verl_aqn.runs.evidence import judge_run
from verl_aqn.runs.folder import RunFolder
from verl_aqn.shards import distinct, not_covered
from verl_aqn.verl_api import tripwire
from verl_aqn.verl_api.base import BaseRecords
from verl_aqn.verl_api.divergence import saved_where_it_diverges
from verl_aqn.verl_api.failures import answered, failure_text
from verl_aqn.verl_api.groups import AqnReplayBuffer, check_refill, count_groups, remedy
from verl_aqn.verl_api.parity import can_rescore, clip_range, scored_again, step_metrics
from verl_aqn.verl_api.rows import rows_of, told_rows
from verl_aqn.verl_api.use import TRAINER, UseOfNoise
from verl_aqn.verl_api.validation import ValidatingTrainer
from verl_aqn.verl_api.workers import AqnActorWorker, AqnTrainingWorker
from verl_aqn.watchdog import ENDING


class AqnTrainer(ValidatingTrainer):
    """Hooks of one run; records go to the run folder `aqn.run.dir`."""

    def __init__(self, config: DictConfig):
        super().__init__(config)
        self.aqn = parse_aqn(config)
        assert self.aqn.run.dir is not None
        self.folder = RunFolder(Path(self.aqn.run.dir))
        self.noise_metrics: dict[str, float] = {}
        self.synced_bytes = 0
        mxfp4 = self.aqn.mxfp4
        self.base = BaseRecords(
            config.actor_rollout_ref.model.path, mxfp4.serve, mxfp4.activation_arithmetic, self.event
        )
        self.slicing_of_rank: list[int] = []
        self.clean_logp: dict[str, list[float]] = {}  # of the rollout's own sequences, scored again without noise
        # Mean |Δ log-prob| between trainer and rollout of each compared step, those of earlier attempts first.
        evidence = list(self.folder.read("evidence.jsonl"))
        self.mismatches: list[float] = [
            record["abs_dlogp_mean"] for record in evidence if record["kind"] == "mismatch" and record.get("source")
        ]
        self.use = UseOfNoise(evidence)
        self.compared = self.told_uncompared = self.told_unpredicted = False  # in this attempt

    # ---- verl's seams ----

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            cls = AqnTrainingWorker if role == Role.Critic else AqnActorWorker
            self.role_worker_mapping[role] = ray.remote(cls)

    def _init_dataloader(self):
        with told_rows(self.config):
            super()._init_dataloader()
        self.tell_rows()
        left = " that are left of the file (too long ones are filtered)"
        assert check_steps(self.config, len(self.train_dataset), left) == self.total_training_steps

    def _build_replay_buffer(self):
        buffer = super()._build_replay_buffer()
        buffer.__class__ = AqnReplayBuffer
        buffer.begin()  # prompts are added before the first sample is taken
        buffer.poll_interval = 0.1  # verl looks every 2 s whether the answers are there
        return buffer

    def _add_prompts_to_generate(self, num_prompts):
        buffer, sigma = self.replay_buffer, self.noise_metrics.get("aqn/sigma", 0.0)
        check_refill(buffer.thrown_away, buffer.failed, self.config, self.global_steps, sigma)
        return super()._add_prompts_to_generate(num_prompts)

    def _submit_batch_to_rollout(self, *args, **kwargs):
        self.doing("generation")  # anew for what refills thrown away groups: a sign of life
        return super()._submit_batch_to_rollout(*args, **kwargs)

    def on_init_end(self):
        self.schedule = schedule_of(self.config, self.total_training_steps)
        self.judge = Judge(
            lambda step: order_of(self.aqn.noise, self.schedule, step),
            stage_at=self.schedule.stage,
            noisy_actor=self.aqn.noise.in_actor,
        )
        self.event("rollout ready")
        addresses = ray.get([server.get_server_address.remote() for server in self.servers()])
        self.record(
            "placed",
            evidence=VERSION,
            actor_nodes=self.actor_rollout_wg.node(),
            rollout_nodes=[address for address, _ in addresses],
        )
        self.layout = self.actor_rollout_wg.layout()[0]
        self.record("layout", layout=self.layout)
        self.event(f"layout of the actor's batches: {self.layout}")
        super().on_init_end()  # wakes the replicas (verl put them to sleep) and sends the adapter
        # The first order here, so that a pattern that matches nothing is told before anything is generated.
        order = order_of(self.aqn.noise, self.schedule, 0)
        ranks = self.rollout("aqn_prepare", order.to_dict())
        norms, expected = ranks[0], expected_norms(self.config.actor_rollout_ref.model.path)
        for rank, answer in enumerate(ranks):
            self.record("rollout", rank=rank, ranks=len(ranks), **answer, expected_norms=expected)
        compared = self.check_base("start")
        self.check_adapter()
        linears = f" and {norms['linears']} linear weights" if norms["linears"] else ""
        alone = f" ({len(norms['router_norms'])} in front of routers left alone)" if norms["router_norms"] else ""
        self.event(f"{norms['norms']} norms{linears} found{alone}, adapter equal in actor and rollout")
        self.event(compared)

    def on_step_begin(self):
        self.doing("noise")
        super().on_step_begin()
        self.apply_noise(self.global_steps - 1)

    def on_sample_end(self):
        rollout = self.config.actor_rollout_ref.rollout
        asked = self.config.data.train_batch_size * rollout.n
        self.noise_metrics["aqn/answers_failed"] = self.tell_failed("train", asked, self.replay_buffer.taken.keys)
        taken = self.replay_buffer.taken.keys
        keys = scored_again(taken, self.aqn.parity.rescore if can_rescore(rollout) else 0)
        sigma = self.noise_metrics["aqn/sigma"]
        if not self.compared and tripwire.source_of(rollout, sigma, self.aqn.noise.in_actor) == "rescored":
            keys = scored_again(taken, max(1, len(taken) // tripwire.FIRST_SAMPLES))
        with marked_timer("rescore", self.timing_raw):
            self.clean_logp = self.score_without_noise(keys) if keys else {}
        super().on_sample_end()  # puts the rollout to sleep on devices that can
        if self.aqn.noise.in_actor:
            self.apply_actor_noise(self.global_steps - 1)

    def _step_once(self, metrics, timing_raw, sample_batch_size):
        batch = super()._step_once(metrics, timing_raw, sample_batch_size)
        if self.aqn.noise.in_actor:
            self.restore_actor()
        return batch

    def _compute_old_log_prob(self, batch, metrics):
        self.doing("log-probs")
        noisy = self.log_probs_with_noise(batch)
        correction = self.config.algorithm.rollout_correction
        if correction and correction.get("bypass_mode"):
            if self.compared and noisy is None:
                self.uncompared("algorithm.rollout_correction.bypass_mode=true takes the rollout's log-probs")
            else:  # the trainer's log-probs are computed for these checks alone
                self.check_mismatch(self.trainer_log_probs(batch))
            self.check_use(batch, noisy)
            return super()._compute_old_log_prob(batch, metrics)
        batch = super()._compute_old_log_prob(batch, metrics)
        self.check_mismatch(batch)
        self.check_use(batch, noisy)
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

    def fit(self, agent_loop_manager):
        super().fit(agent_loop_manager)
        self.restore_clean(END)
        self.doing("base")  # with a time of its own for the watchdog
        self.check_base("end")
        peaks = {"actor": self.actor_rollout_wg.memory_peak(), "rollout": self.rollout("aqn_memory_peak")}
        self.write("events.jsonl", kind="memory", **peaks)
        if faults := judge_run(self.folder, finished=True).faults:  # all records once more, and what is not there
            raise EvidenceError(f"the run's own evidence does not hold: {faults[0]}")
        self.doing(ENDING)

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        timing_raw.pop("save_checkpoint", None)  # that is only due yet
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        metrics.update(self.noise_metrics)
        metrics["aqn/synced_bytes"] = self.synced_bytes
        metrics.update(self.group_and_parity_metrics(batch, metrics))
        numbers = {key: float(value) for key, value in metrics.items() if _is_number(value)}
        self.write("metrics.jsonl", kind="step", step=global_steps, total=self.total_training_steps, metrics=numbers)
        if self.save_due:
            self.doing("checkpoint")
            self.save()

    # ---- groups and parity ----

    def score_without_noise(self, keys: list[str]) -> dict[str, list[float]]:
        """Log-probabilities that the rollout, with this step's adapter and clean norms, gives to its own responses."""
        self.restore_clean(RESCORING)
        data = transfer_queue.kv_batch_get(keys=keys, partition_id="train", select_fields=["prompts", "responses"])
        servers, asked = self.servers(), []
        longest = self.config.actor_rollout_ref.rollout.max_model_len - 1  # the engine wants room for one token more
        for n, (prompt, response) in enumerate(zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True)):
            tokens = [*prompt.tolist(), *response.tolist()]
            params = {"prompt_logprobs": 0, "max_tokens": 1}
            request = servers[n % len(servers)].generate.remote(tokens[:longest], params, f"score-{keys[n]}")
            asked.append((keys[n], len(prompt), request))
        found = {}
        for key, start, request in asked:
            scores = ray.get(request).extra_fields["prompt_logprobs"]  # of tokens 1, 2, …; the last is a filler
            found[key] = [score for (score,) in scores[start - 1 : -1]]
        return found

    def check_mismatch(self, batch: Any) -> None:
        """Hold the trainer's log-probs of this step against the rollout's, before anything is learnt from them."""
        actor_rollout, sigma = self.config.actor_rollout_ref, self.noise_metrics["aqn/sigma"]
        source = tripwire.source_of(actor_rollout.rollout, sigma, self.aqn.noise.in_actor)
        if source is None:
            reason = f"temperature {actor_rollout.rollout.temperature:g}, top_p {actor_rollout.rollout.top_p:g}"
            self.uncompared(f"{reason}, σ {sigma:g}")
            if not self.mismatches and not self.told_uncompared:
                self.told_uncompared = True  # once
                self.warn(
                    f"step {self.global_steps}: log-probs of trainer and rollout are not compared ({reason}, σ "
                    f"{sigma:g}): a difference would not be noticed before a step that can be"
                )
            return
        keys = real_keys(batch)
        fields = ["response_mask", "old_log_probs", *(["rollout_log_probs"] if source == "sampled" else [])]
        data = transfer_queue.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        clip = clip_range(actor_rollout.actor)
        found = tripwire.measure(data.to_padded_tensor(), keys, self.clean_logp, source, clip)
        if found is None:
            self.uncompared("no sample was scored again without noise (aqn.parity.rescore)")
            return
        limits = self.aqn.parity
        bounds = {key: value if math.isfinite(value) else "none" for key, value in asdict(limits).items()}
        record = {"step": self.global_steps, "warn": bounds["warn"], "stop": bounds["stop"], **found}
        self.folder.add_evidence({"kind": "mismatch", **record})
        text = tripwire.judge(found, self.global_steps, self.mismatches, limits, self.layout)  # names likely causes
        self.judged("mismatch", record)
        if text:
            self.warn(text)
        elif not self.compared:
            self.event(
                f"trainer and rollout within {found['abs_dlogp_mean']:.2g} nats a token ({found['tokens']:,} tokens)"
            )
        self.compared = True
        self.mismatches.append(found["abs_dlogp_mean"])

    def uncompared(self, reason: str) -> None:
        """Put on record that the log-probs of this step are not compared, and why."""
        self.record("mismatch", step=self.global_steps, source=None, reason=reason)

    def trainer_log_probs(self, batch: Any) -> Any:
        """The batch with the trainer's own log-probs, whatever the run learns from."""
        correction = self.config.algorithm.rollout_correction
        bypass = correction and correction.get("bypass_mode")
        if bypass:
            correction.bypass_mode = False
        batch = super()._compute_old_log_prob(batch, {})
        if bypass:
            correction.bypass_mode = True
        return batch

    def log_probs_with_noise(self, batch: Any) -> torch.Tensor | None:
        """The trainer's log-probs [B, R] with the rollout's noise, in the first step that has any; else None."""
        sigma = self.noise_metrics["aqn/sigma"]
        if self.aqn.noise.in_actor or sigma == 0 or self.use.by == TRAINER or not self.use_can_be_seen():
            return None
        order = order_of(self.aqn.noise, self.schedule, self.global_steps - 1)
        reason = next(filter(None, self.actor_rollout_wg.cannot_carry_noise(order.to_dict())), "")
        if not reason:
            held = self.actor_rollout_wg.apply_noise(order.to_dict())
            if {one["weights_digest"] for one in held} == {self.rollout_noise["rollout rank 0"]["weights_digest"]}:
                self.trainer_log_probs(batch)
                noisy = self.log_probs_of(batch, ["old_log_probs"])["old_log_probs"]
                if all(one["uses"] for one in self.actor_rollout_wg.restore_clean()):
                    return noisy
                reason = "its forward did not use it"
            else:
                self.actor_rollout_wg.restore_clean()
                reason = "its norms with noise are not those of the rollout"
        if not self.told_unpredicted:
            self.told_unpredicted = True
            self.warn(f"what noise does was not measured in the actor ({reason}): a rollout that ignores it may pass")
        return None

    def use_can_be_seen(self) -> bool:
        """Whether samples of this step were scored again, and are comparable."""
        return bool(self.clean_logp) and can_rescore(self.config.actor_rollout_ref.rollout)

    def check_use(self, batch: Any, noisy_trainer: torch.Tensor | None) -> None:
        """Check that this step's noise moved the rollout's log-probs, where some of its samples were scored again."""
        if not self.use_can_be_seen():
            return
        sigma, noisy = self.noise_metrics["aqn/sigma"], self.aqn.noise.in_actor
        # In bypass mode the trainer's are there only where something was to be compared with them.
        trainer = ["old_log_probs"] if noisy_trainer is not None or noisy else []
        data = self.log_probs_of(batch, ["response_mask", "rollout_log_probs", *trainer])
        if noisy and sigma:
            noisy_trainer = data["old_log_probs"]
        mismatch = self.mismatches[-1] if self.mismatches else 0.0
        found = self.use.measure(data, real_keys(batch), self.clean_logp, sigma, mismatch, noisy_trainer)
        if found:
            self.record("use", step=self.global_steps, **found)

    def log_probs_of(self, batch: Any, fields: list[str]) -> Any:
        """Fields [B, R] of a batch, padded."""
        keys = real_keys(batch)
        return transfer_queue.kv_batch_get(
            keys=keys, partition_id=batch.partition_id, select_fields=fields
        ).to_padded_tensor()

    def group_and_parity_metrics(self, batch: Any, metrics: dict) -> dict[str, float]:
        """`aqn/groups…` and `aqn/parity/…` of a step; see verl_api/parity.py for what each figure is."""
        keys = real_keys(batch)
        fields = ["rm_scores", "response_mask", "rollout_log_probs", "old_log_probs", "entropy"]
        data = transfer_queue.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        data = data.to_padded_tensor()
        rewards = data["rm_scores"].sum(dim=1).tolist()
        groups, flat = count_groups([key.rsplit("_", 2)[0] for key in keys], rewards)
        if groups and flat == groups and not self.use_critic:
            sigma, mean = self.noise_metrics["aqn/sigma"], sum(rewards) / len(rewards)
            self.warn(
                f"step {self.global_steps}: in no group do the rewards differ, so it teaches nothing (σ {sigma:g}, "
                f"mean reward {mean:.3f}): {remedy(sigma, mean, self.aqn.noise)}"
            )
        refused = self.replay_buffer.thrown_away.total()
        groups += refused + int(metrics.get("training/filter_groups/discarded_surplus_samples", 0))
        found = {"aqn/groups": groups, "aqn/groups_without_variance": flat + refused}
        if {"rollout_log_probs", "old_log_probs", "entropy"} <= set(data.keys()):  # bypass mode has one of them only
            clip = clip_range(self.config.actor_rollout_ref.actor)
            # What only the check of the mismatch scored again is not comparable with what top_p left over.
            rescored = self.clean_logp if can_rescore(self.config.actor_rollout_ref.rollout) else {}
            found |= step_metrics(data, keys, rescored, clip, self.aqn.noise.in_actor)
        return found

    # ---- noise and evidence ----

    def servers(self) -> list[Any]:
        """The server of every replica."""
        return [replica.servers[0] for replica in self.llm_server_manager.get_replicas()]

    def rollout(self, method: str, *args: Any, clear_cache: bool = False) -> list[dict]:
        """Answers of every rank of every replica."""
        servers = self.servers()
        answers = ray.get([server.aqn_call.remote(method, *args, clear_cache=clear_cache) for server in servers])
        return [answer for replica in answers for answer in replica]

    def apply_noise(self, step: int) -> None:
        """Noise of RL step `step` (from 0) on every replica, read back and checked."""
        order = order_of(self.aqn.noise, self.schedule, step)
        ranks = self.rollout("aqn_apply_noise", order.to_dict(), clear_cache=True)
        self.check_ranks("noise", ranks, stage=self.schedule.stage(step))
        self.rollout_noise = {f"rollout rank {rank}": evidence for rank, evidence in enumerate(ranks)}
        self.noise_metrics = {
            "aqn/sigma": order.sigma,
            "aqn/sigma_realised": ranks[0]["sigma_realised"],
            "aqn/stage": self.schedule.stage(step),
            "aqn/modules": ranks[0]["modules"],
        }

    def restore_clean(self, when: str) -> None:
        """Clean weights on every replica, bit for bit. `when`: as `judge.records` names the moment."""
        self.check_ranks("clean", self.rollout("aqn_restore", clear_cache=True), when=when, at=self.global_steps)

    def apply_actor_noise(self, step: int) -> None:
        """The noise of the rollout of RL step `step`, bit for bit, in the forward of every actor rank."""
        order = order_of(self.aqn.noise, self.schedule, step)
        ranks = self.actor_rollout_wg.apply_noise(order.to_dict())
        self.check_ranks("actor noise", ranks)

    def restore_actor(self) -> None:
        """No noise in the actor, after it was used."""
        ranks = self.actor_rollout_wg.restore_clean()
        self.check_ranks("actor clean", ranks, at=self.global_steps, sigma_used=self.noise_metrics["aqn/sigma"])

    def check_ranks(self, kind: str, ranks: list[dict], **more: Any) -> None:
        """Put on record what each rank read back, and judge it."""
        for rank, evidence in enumerate(ranks):
            self.record(kind, rank=rank, **more, **evidence)

    def check_adapter(self) -> None:
        """The rollout multiplies with the adapter that the actor sent."""
        held = self.rollout("aqn_adapter")
        slices, sizes = ([answer.pop(key) for answer in held] for key in ("slices", "sizes"))
        if not self.slicing_of_rank:  # the first: now it is known in which parts the ranks hold it
            slicings, self.slicing_of_rank = distinct(slices)
            self.actor_rollout_wg.expect_slices(slicings)
            if missing := not_covered(slices, sizes[0].__getitem__):
                raise EvidenceError(f"the rollout's ranks together do not hold the whole adapter of {missing}")
        digests, self.synced_bytes = self.actor_rollout_wg.sent_adapters()[0]
        wanted = [digests[slicing] for slicing in self.slicing_of_rank]
        # `whole`: every rank holds all of what was sent, so that all digests are one.
        whole, told = len(digests) == 1, {"sent": digests[0], "wanted": wanted, "bytes": self.synced_bytes}
        self.record("adapter", step=self.global_steps, whole=whole, **told, held=held)

    def check_base(self, when: str) -> str:
        """Hold every frozen tensor of actor and rollout against the folder's; returns what was compared."""
        began, servers = time.monotonic(), self.servers()
        asked = [server.aqn_call.remote("aqn_base", self.base.packed, clear_cache=False) for server in servers]
        actor = self.actor_rollout_wg.base()  # while the rollout looks at its own
        held = [answer for replica in ray.get(asked) for answer in replica]
        ranks = {"actor": self.actor_rollout_wg.world_size, "rollout": self.actor_rollout_wg.world_size}
        record = self.base.record(when, actor, held, ranks, began)
        self.record("base", **record)
        return sentence(record)

    # ---- rows and answers ----

    def tell_rows(self) -> None:
        """What became of the rows of both sets' files, on record and told."""
        sets = {"train": (self.train_dataset, "training data"), "val": (self.val_dataset, "validation data")}
        for part, (dataset, name) in sets.items():
            rows = rows_of(dataset, [str(file) for file in data_files(self.config, f"{part}_files")])
            self.write("events.jsonl", kind="rows", set=part, **asdict(rows))
            (self.warn if rows.failed else self.event)(f"{name}: {rows.text}")

    def tell_failed(self, part: str, asked: int, keys: list[str]) -> int:
        """How many of `asked` answers are not among `keys`: told as a warning, with the reason where one is known."""
        if failed := asked - answered(keys):
            self.warn(failure_text(self.folder, part, self.global_steps, asked, failed))
        return failed

    # ---- records ----

    def write(self, name: str, **record: Any) -> None:
        self.folder.append(name, record)

    def record(self, kind: str, **evidence: Any) -> None:
        """Put evidence on record, and stop the run where it does not hold."""
        self.folder.add_evidence({"kind": kind, **evidence})
        self.judged(kind, evidence)

    def judged(self, kind: str, evidence: dict) -> None:
        """Raise EvidenceError where a record does not hold."""
        if fault := self.judge.add({"kind": kind, **evidence}):
            raise EvidenceError(f"{fault}; see evidence.jsonl")

    def event(self, text: str) -> None:
        self.write("events.jsonl", kind="phase", text=text, time=time.time())

    def doing(self, phase: str) -> None:
        """What happens from now on; the watchdog counts the time."""
        self.write("events.jsonl", kind="doing", phase=phase, step=self.global_steps, time=time.time())

    def warn(self, text: str) -> None:
        self.write("events.jsonl", kind="warning", text=text)


def real_keys(batch: Any) -> list[str]:
    """The keys of a batch's samples, without its padding."""
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
