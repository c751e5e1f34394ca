"""verl's own synchronous trainer, with a record of what reached the rollout after each step."""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_from_nested

from verl_aqn.checkpoints.slices import distinct, not_covered
from verl_aqn.config.stock_settings import NOT_CHECKED, OPTION, StockSettings, model_folder
from verl_aqn.errors import AqnError, ConfigError, EvidenceError, first_line
from verl_aqn.integrations.verl import tripwire
from verl_aqn.integrations.verl.base_evidence import BaseRecords
from verl_aqn.integrations.verl.batches import fields_of, real_keys
from verl_aqn.integrations.verl.figures import numbers_in
from verl_aqn.integrations.verl.root_cause import root_cause
from verl_aqn.integrations.verl.stock_workers import StockActorWorker, register_replica
from verl_aqn.integrations.verl.token_mismatch import clip_range, step_metrics, truncates
from verl_aqn.runs.evidence import judge_run
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.judge.base_record import sentence
from verl_aqn.runs.judge.mismatch import least
from verl_aqn.runs.judge.ranks import grouped_base
from verl_aqn.runs.judge.records import VERSION
from verl_aqn.runs.judge.stock_records import StockJudge


class StockTrainer(PPOTrainerSync):
    """verl's trainer with checks. `verl_aqn.integrations.verl.stock_hook` turns an object of verl's into this class.

    `changed`: the settings that were changed in the config for the checks.
    """

    settings: StockSettings
    changed: list[str]
    folder: RunFolder

    def begin_evidence(self) -> None:
        """Create the run's folder. Called as soon as the number of steps is known."""
        self.judge = StockJudge()
        self.warned = False
        config = self.config.copy()
        OmegaConf.update(config, "trainer.total_training_steps", self.total_training_steps, force_add=True)
        plain: Any = OmegaConf.to_container(config, resolve=True)
        self.folder = open_run(self.settings.base, plain, fresh=True)
        self.folder.write_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
        state = self.folder.state
        self.folder.append("events.jsonl", {"kind": "attempt", **state, "evidence": VERSION})
        self.tell(f"evidence of this run: {self.folder.path} (verl-aqn report {self.folder.path} -o evidence.html)")
        for text in (*(f"set {one}" for one in self.changed), NOT_CHECKED):
            self.warn(text)

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        register_replica()
        for role in self.role_worker_mapping:
            if role in (Role.ActorRollout, Role.ActorRolloutRef):
                self.role_worker_mapping[role] = ray.remote(StockActorWorker)

    def on_init_end(self):
        with self.ending():
            self.base = BaseRecords(model_folder(self.config.actor_rollout_ref.model.path), "bf16", "none", self.tell)
            if self.base.disk.quantised:
                raise ConfigError(f"{OPTION} checks only 16-bit bases, but {self.base.disk.path} is packed MXFP4")
            servers = self.servers()
            addresses = ray.get([server.get_server_address.remote() for server in servers])
            nodes, size = self.actor_rollout_wg.node(), self.actor_rollout_wg.world_size
            self.record(
                "placed",
                evidence=VERSION,
                stock=True,
                actor_nodes=nodes,
                rollout_nodes=[address for address, _ in addresses],
                rollout_ranks=size,
            )
            actor = self.actor_rollout_wg.base()  # while the rollout sleeps
            self.actor_rollout_wg.remember_adapter()
            super().on_init_end()
            self.check_adapter()
            self.check_base("start", actor, self.ask("aqn_base", self.base.packed))

    def on_step_end(self):
        self.actor_rollout_wg.remember_adapter()
        super().on_step_end()
        self.check_adapter()

    def _compute_old_log_prob(self, batch, metrics):
        unadapted = self.log_probs_without_adapter(batch) if self.looks_at_use() else None
        batch = super()._compute_old_log_prob(batch, metrics)
        self.check_mismatch(batch, metrics, unadapted)
        return batch

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        numbers, total = numbers_in(metrics), self.total_training_steps
        self.folder.append("metrics.jsonl", {"kind": "step", "step": global_steps, "total": total, "metrics": numbers})

    def fit(self, agent_loop_manager):
        with self.ending():
            super().fit(agent_loop_manager)
            self.record("requests", when="end", **self.requests())  # for a validation after the last sync
            rollout = self.ask("aqn_base", self.base.packed)
            self.checkpoint_manager.sleep_replicas()  # room for the actor
            self.check_base("end", self.actor_rollout_wg.base(), rollout)
            faults = judge_run(self.folder, finished=True).faults
            if faults and self.settings.on_fault == "stop":
                raise EvidenceError(f"the evidence of the run has a fault: {faults[0]}")
            self.folder.set_status("finished", f"faults: {faults[0]}" if faults else "")
            self.folder.close()
            text = f"evidence NOT valid: {faults[0]}" if faults else "evidence valid: adapter, base and mismatch"
            self.tell(f"{text} ({self.folder.path})")

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Record the error if the run ends with one."""
        try:
            yield
        except Exception as error:
            cause = root_cause(error)
            line = first_line(cause)[:500]
            if isinstance(cause, EvidenceError):
                self.folder.add_evidence({"kind": "stopped", "reason": line})
            text = line if isinstance(cause, AqnError) else f"{type(cause).__name__}: {line}"
            self.folder.append("events.jsonl", {"kind": "error", "text": text, "trace": traceback.format_exc()[-4000:]})
            self.folder.set_status("failed", text)
            self.folder.close()
            raise

    # ---- calls to the run's processes ----

    def servers(self) -> list[Any]:
        """Return the server of every replica."""
        return [replica.servers[0] for replica in self.llm_server_manager.get_replicas()]

    def ask(self, method: str, *args: Any) -> list[dict]:
        """Call `method` on every rank of every replica, and return the answers."""
        answers = ray.get([server.aqn_call.remote(method, *args) for server in self.servers()])
        return [answer for replica in answers for answer in replica]

    def requests(self) -> dict[str, Any]:
        """Return for each replica whether it lists the adapter, and how many requests came since the last call."""
        told = ray.get([server.aqn_requests.remote() for server in self.servers()])
        counts = {key: sum(one[key] for one in told) for key in ("with", "without")}
        return {"listed": [one["listed"] for one in told], "requests": counts}

    def check_base(self, when: str, actor: list[dict], rollout: list[dict]) -> None:
        """Compare every frozen tensor of actor and rollout with the checkpoint on disk."""
        size = self.actor_rollout_wg.world_size
        record = self.base.record(when, actor, rollout, {"actor": size, "rollout": size})
        if self.record("base", **grouped_base(record)):
            self.tell(sentence(record))

    def check_adapter(self) -> None:
        """Compare the adapter that the rollout multiplies with to the adapter in the actor."""
        actual = self.ask("aqn_adapter_or_fault")
        slices, sizes = ([answer.pop(key, {}) for answer in actual] for key in ("slices", "sizes"))
        slicings, of_rank = distinct(slices)
        dtype = next((one["dtype"] for one in actual if "dtype" in one), "bfloat16")
        actor = self.actor_rollout_wg.adapter(dtype, slicings)[0]
        uncovered = not_covered(slices, sizes[0].__getitem__)
        good = self.record(
            "adapter",
            step=self.global_steps,
            sent=actor["digest"],
            expected=[actor["parts"][place] for place in of_rank],
            modules=actor["modules"],
            bytes=actor["bytes"],
            faults=actor["faults"],
            actual=actual,
            uncovered=[uncovered] if uncovered else [],
            **self.requests(),
        )
        if good and not self.global_steps:
            self.tell(f"adapter of {actor['modules']} modules equal in actor and rollout")

    # ---- log-probs ----

    def looks_at_use(self) -> bool:
        """Return whether this step's log-probs are also computed without the adapter: steps 2, 4, 8, … and the last.

        This costs one more forward. In the first step a new adapter is still zero.
        """
        step = self.global_steps
        comparable = self.uncomparable() == ""
        return comparable and ((step > 1 and step & (step - 1) == 0) or step == self.total_training_steps)

    def uncomparable(self) -> str:
        """Return why log-probs of actor and rollout cannot be compared, or "" if they can."""
        rollout = self.config.actor_rollout_ref.rollout
        if (self.config.algorithm.get("rollout_correction") or {}).get("bypass_mode"):
            return "algorithm.rollout_correction.bypass_mode=true uses the rollout's log-probs as the actor's"
        if truncates(rollout):
            return f"top_p {rollout.top_p:g} and top_k {rollout.top_k} exclude tokens from the rollout's log-probs"
        return ""

    def log_probs_without_adapter(self, batch: Any) -> Any:
        """Compute the actor's log-probs [B, R] without its adapter; the log-probs of the batch are computed later."""
        temperature = self.config.actor_rollout_ref.rollout.temperature
        told = {"calculate_entropy": False, "compute_loss": False, "no_lora_adapter": True, "temperature": temperature}
        batch.extra_info.update(told)
        self.actor_rollout_wg.compute_log_prob(batch)
        batch.extra_info.pop("no_lora_adapter")
        data = fields_of(batch, ["log_probs", "response_mask"])
        data["log_probs"] = response_from_nested(data["log_probs"], data["response_mask"])
        return data.to_padded_tensor()["log_probs"]

    def check_mismatch(self, batch: Any, metrics: dict, unadapted: Any) -> None:
        """Compare the actor's log-probs with those at which the rollout sampled, before the update uses them."""
        step, settings = self.global_steps, self.settings
        if reason := self.uncomparable():
            self.record("mismatch", step=step, source=None, reason=reason)
            return
        names = ["response_mask", "old_log_probs", "rollout_log_probs", "entropy"]
        data, keys = fields_of(batch, names).to_padded_tensor(), real_keys(batch)
        clip = clip_range(self.config.actor_rollout_ref.actor)
        found = tripwire.measure(data, keys, {}, "sampled", clip)
        if found is None:
            self.record("mismatch", step=step, source=None, reason="the step has no response token")
            return
        metrics.update(step_metrics(data, keys, {}, clip))
        good = self.record("mismatch", step=step, warn=settings.warn, stop=settings.stop, **found)
        if good and least(found) > settings.warn and not self.warned:
            self.warned = True  # warn only once
            mean = found["abs_dlogp_mean"]
            self.warn(
                f"step {step}: actor and rollout differ by {mean:.3g} nats per token (verl_aqn.warn={settings.warn:g})"
            )
        if unadapted is not None:
            self.record("adapter use", step=step, **use_of_adapter(data, unadapted))

    # ---- records ----

    def record(self, kind: str, **evidence: Any) -> bool:
        """Record evidence, and return whether it is right; for a fault, stop the run or warn, as `on_fault` says."""
        record = {"kind": kind, **evidence}
        self.folder.add_evidence(record)
        fault = self.judge.add(record)
        if fault and self.settings.on_fault == "stop":
            raise EvidenceError(f"{fault}; see {self.folder.path}/evidence.jsonl")
        if fault:
            self.warn(fault)
        return not fault

    def tell(self, text: str) -> None:
        """Record a line, and print it."""
        self.folder.append("events.jsonl", {"kind": "phase", "text": text, "time": time.time()})
        print(f"[verl-aqn] {text}", flush=True)

    def warn(self, text: str) -> None:
        """Record a warning, and print it."""
        self.folder.append("events.jsonl", {"kind": "warning", "text": text})
        print(f"[verl-aqn] warning: {text}", flush=True)


def use_of_adapter(data: Any, unadapted: Any) -> dict[str, float]:
    """Return the record `adapter use` (`verl_aqn.runs.judge.stock_records`) of a step, without its field `step`.

    Args:
        data: `response_mask`, `old_log_probs` (the actor's, with its adapter) and `rollout_log_probs`, each [B, R].
        unadapted: the actor's log-probs [B, R] without its adapter.
    """
    mask = data["response_mask"].bool()
    rollout, actor = data["rollout_log_probs"][mask].double(), data["old_log_probs"][mask].double()
    bare = unadapted[mask].double()
    to_adapter, to_base = (rollout - actor).abs(), (rollout - bare).abs()
    nearer, tokens = to_adapter - to_base, int(mask.sum())
    return {
        "tokens": tokens,
        "effect": (actor - bare).abs().mean().item(),
        "to_adapter": to_adapter.mean().item(),
        "to_base": to_base.mean().item(),
        "nearer": nearer.mean().item(),
        "error": nearer.std(correction=0).item() / math.sqrt(tokens),
    }
