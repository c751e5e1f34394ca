"""verl's synchronous trainer with noise by schedule, and evidence of everything that reaches the rollout.

One place decides σ: `on_step_begin` here. The rollout is told, and what it answers is checked there and then.
"""

import time
from pathlib import Path
from typing import Any

import ray
import transfer_queue
from omegaconf import DictConfig
from verl.trainer.ppo.utils import Role
from verl.utils.debug import marked_timer

import verl_aqn.verl_api.rollout  # noqa: F401  registers the replica
from verl_aqn.config import order_of, parse_aqn, schedule_of
from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4.checkpoint import check_covered, checkpoint_digest
from verl_aqn.mxfp4.model import open_packed, packed_modules
from verl_aqn.noise import check_equal_noise, check_evidence, check_norms, check_used, expected_norms
from verl_aqn.order import NoiseOrder
from verl_aqn.prepare import check_steps
from verl_aqn.runs.folder import RunFolder
from verl_aqn.shards import distinct, not_covered
from verl_aqn.verl_api import tripwire
from verl_aqn.verl_api.divergence import saved_where_it_diverges
from verl_aqn.verl_api.groups import AqnReplayBuffer, check_refill, count_groups, remedy
from verl_aqn.verl_api.parity import can_rescore, clip_range, scored_again, step_metrics
from verl_aqn.verl_api.validation import ValidatingTrainer
from verl_aqn.verl_api.workers import AqnActorWorker, AqnTrainingWorker
from verl_aqn.vllm_api.readback import check_activations
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
        self.base_weights: list[str | None] = []
        self.slicing_of_rank: list[int] = []
        self.clean_logp: dict[str, list[float]] = {}  # of the rollout's own sequences, scored again without noise
        # Mean |Δ log-prob| between trainer and rollout of each compared step, those of earlier attempts first.
        self.mismatches: list[float] = [
            record["abs_dlogp_mean"] for record in self.folder.read("evidence.jsonl") if record["kind"] == "mismatch"
        ]
        self.compared = self.told_uncompared = False  # in this attempt

    # ---- verl's seams ----

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            cls = AqnTrainingWorker if role == Role.Critic else AqnActorWorker
            self.role_worker_mapping[role] = ray.remote(cls)

    def _init_dataloader(self):
        super()._init_dataloader()
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
        self.event("rollout ready")
        addresses = ray.get([server.get_server_address.remote() for server in self.servers()])
        self.record(
            "placed", actor_nodes=self.actor_rollout_wg.node(), rollout_nodes=[address for address, _ in addresses]
        )
        self.layout = self.actor_rollout_wg.layout()[0]
        self.record("layout", layout=self.layout)
        self.event(f"layout of the actor's batches: {self.layout}")
        super().on_init_end()  # wakes the replicas (verl put them to sleep) and sends the adapter
        # The first order here, so that a pattern that matches nothing is told before anything is generated.
        order = order_of(self.aqn.noise, self.schedule, 0)
        ranks = self.rollout("aqn_prepare", order.to_dict())
        norms, expected = ranks[0], expected_norms(self.config.actor_rollout_ref.model.path)
        self.clean_digest = norms["clean_digest"]
        self.record("rollout", **norms, expected_norms=expected)
        check_norms(expected, ranks, order)
        self.check_base("start")
        self.check_adapter()
        linears = f" and {norms['linears']} linear weights" if norms["linears"] else ""
        alone = f" ({len(norms['router_norms'])} in front of routers left alone)" if norms["router_norms"] else ""
        self.event(f"{norms['norms']} norms{linears} found{alone}, base and adapter equal in actor and rollout")

    def on_step_begin(self):
        self.doing("noise")
        super().on_step_begin()
        self.apply_noise(self.global_steps - 1)

    def on_sample_end(self):
        rollout = self.config.actor_rollout_ref.rollout
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
        correction = self.config.algorithm.rollout_correction
        if not (correction and correction.get("bypass_mode")):
            batch = super()._compute_old_log_prob(batch, metrics)
            self.check_mismatch(batch)
            return batch
        if not self.compared:  # the trainer's log-probs are computed for this check alone
            correction.bypass_mode = False
            self.check_mismatch(super()._compute_old_log_prob(batch, {}))
            correction.bypass_mode = True
        return super()._compute_old_log_prob(batch, metrics)

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
        self.restore_clean()
        super().on_validate_begin()

    def fit(self, agent_loop_manager):
        super().fit(agent_loop_manager)
        self.restore_clean()
        self.check_base("end")
        peaks = {"actor": self.actor_rollout_wg.memory_peak(), "rollout": self.rollout("aqn_memory_peak")}
        self.write("events.jsonl", kind="memory", **peaks)
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
        self.restore_clean()
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
            if not self.mismatches and not self.told_uncompared:
                self.told_uncompared = True  # once
                self.warn(
                    f"step {self.global_steps}: log-probs of trainer and rollout are not compared (temperature "
                    f"{actor_rollout.rollout.temperature:g}, top_p {actor_rollout.rollout.top_p:g}, σ {sigma:g}): a "
                    "difference would not be noticed before a step that can be"
                )
            return
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
        fields = ["response_mask", "old_log_probs", *(["rollout_log_probs"] if source == "sampled" else [])]
        data = transfer_queue.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        clip = clip_range(actor_rollout.actor)
        found = tripwire.measure(data.to_padded_tensor(), keys, self.clean_logp, source, clip)
        if found is None:
            return
        limits = self.aqn.parity
        self.record("mismatch", step=self.global_steps, warn=limits.warn, stop=limits.stop, **found)
        if text := tripwire.judge(found, self.global_steps, self.mismatches, limits, self.layout):
            self.warn(text)
        elif not self.compared:
            self.event(
                f"trainer and rollout within {found['abs_dlogp_mean']:.2g} nats a token ({found['tokens']:,} tokens)"
            )
        self.compared = True
        self.mismatches.append(found["abs_dlogp_mean"])

    def group_and_parity_metrics(self, batch: Any, metrics: dict) -> dict[str, float]:
        """`aqn/groups…` and `aqn/parity/…` of a step; see verl_api/parity.py for what each figure is."""
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]
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
        self.check_ranks("noise", ranks, order, stage=self.schedule.stage(step))
        self.rollout_noise = {f"rollout rank {rank}": evidence for rank, evidence in enumerate(ranks)}
        check_equal_noise(self.rollout_noise)
        self.noise_metrics = {
            "aqn/sigma": order.sigma,
            "aqn/sigma_realised": ranks[0]["sigma_realised"],
            "aqn/stage": self.schedule.stage(step),
            "aqn/modules": ranks[0]["modules"],
        }

    def restore_clean(self) -> None:
        """Clean weights on every replica, bit for bit."""
        self.check_ranks("clean", self.rollout("aqn_restore", clear_cache=True), None)

    def apply_actor_noise(self, step: int) -> None:
        """The noise of the rollout of RL step `step`, bit for bit, in the forward of every actor rank."""
        order = order_of(self.aqn.noise, self.schedule, step)
        ranks = self.actor_rollout_wg.apply_noise(order.to_dict())
        self.check_ranks("actor noise", ranks, order)
        check_equal_noise(self.rollout_noise | {f"actor rank {rank}": evidence for rank, evidence in enumerate(ranks)})

    def restore_actor(self) -> None:
        """No noise in the actor, after it was used."""
        ranks = self.actor_rollout_wg.restore_clean()
        self.check_ranks("actor clean", ranks, None)
        for evidence in ranks:
            check_used(evidence, self.noise_metrics["aqn/sigma"])

    def check_ranks(self, kind: str, ranks: list[dict], order: NoiseOrder | None, **more: Any) -> None:
        """What each rank read back, on record and then held against `order` (None: clean)."""
        for rank, evidence in enumerate(ranks):
            self.record(kind, rank=rank, **more, **evidence)
            check_evidence(evidence, order, self.clean_digest)

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
        self.record("adapter", step=self.global_steps, sent=digests[0], bytes=self.synced_bytes, held=held)
        wanted = [digests[slicing] for slicing in self.slicing_of_rank]
        if [answer["adapter_digest"] for answer in held] != wanted:
            raise EvidenceError(f"after step {self.global_steps} the rollout's adapter is not the one that was sent")

    def check_base(self, when: str) -> None:
        """The base on disk, in the actor and in the rollout (packed, or its values in bf16) is one and the same."""
        actor = self.actor_rollout_wg.base_digest()
        if actor[0] is None:
            self.record("base", when=when, quantised=False)
            return
        path, form = self.config.actor_rollout_ref.model.path, self.aqn.mxfp4.serve
        held = self.rollout("aqn_base", packed_modules(open_packed(Path(path))))
        rounding = self.actor_rollout_wg.activations()
        slicings, slicing_of_rank = distinct([answer["slices"] for answer in held])
        digests = [checkpoint_digest(path, slices, form) for slices in slicings]
        disk = digests[0] if form == "packed" else checkpoint_digest(path)
        # `served`: what a rollout that holds the whole base must show.
        self.record(
            "base", when=when, disk=disk, served=digests[0], actor=actor, actor_activations=rounding, rollout=held
        )
        wanted = [digests[slicing] for slicing in slicing_of_rank]
        if {disk, *actor} != {disk} or [answer["base_digest"] for answer in held] != wanted:
            raise EvidenceError(
                f"at the {when} the MXFP4 base differs between disk, actor and rollout; see evidence.jsonl"
            )
        if {answer["form"] for answer in held} != {form}:
            raise EvidenceError(f"the rollout holds its base as {held[0]['form']}, not as aqn.mxfp4.serve={form}")
        check_covered(path, [answer["slices"] for answer in held])
        # A kernel that keeps weights in an order of its own gives None: there they must be what they were.
        if any(answer["weights_equal_base"] is False for answer in held):
            raise EvidenceError(f"at the {when} the rollout computes with other weights than its MXFP4 base")
        check_activations(self.aqn.mxfp4.activation_arithmetic, rounding, held)
        weights = [answer["weights_digest"] for answer in held]
        if weights != (self.base_weights or weights):
            raise EvidenceError(f"at the {when} the weights of the rollout's MXFP4 layers are not those of the start")
        self.base_weights = weights

    # ---- records ----

    def write(self, name: str, **record: Any) -> None:
        self.folder.append(name, record)

    def record(self, kind: str, **evidence: Any) -> None:
        self.write("evidence.jsonl", kind=kind, **evidence)

    def event(self, text: str) -> None:
        self.write("events.jsonl", kind="phase", text=text, time=time.time())

    def doing(self, phase: str) -> None:
        """What happens from now on; the watchdog counts the time."""
        self.write("events.jsonl", kind="doing", phase=phase, step=self.global_steps, time=time.time())

    def warn(self, text: str) -> None:
        self.write("events.jsonl", kind="warning", text=text)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
