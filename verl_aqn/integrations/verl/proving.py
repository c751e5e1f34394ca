"""Evidence of a run: the trainer's requests to actor and rollout, and what they read back, recorded and judged."""

import time
from typing import Any

import ray
from omegaconf import DictConfig

from verl_aqn.checkpoints.slices import distinct, not_covered
from verl_aqn.config.noise_settings import order_of, rule_of, schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.base_evidence import BaseRecords, with_tables
from verl_aqn.integrations.verl.validation import ValidatingTrainer
from verl_aqn.noise import expected_norms
from verl_aqn.noise.control import ControlledSigma
from verl_aqn.runs.evidence import judge_run
from verl_aqn.runs.folder import EVIDENCE, folder_of
from verl_aqn.runs.judge.base_record import sentence
from verl_aqn.runs.judge.ranks import grouped, grouped_base
from verl_aqn.runs.judge.records import VERSION, Judge


class ProvingTrainer(ValidatingTrainer):
    """A trainer that records and checks noise, adapter and base in the run's processes.

    `record` writes evidence to the run folder, and stops the run if `verl_aqn.runs.judge` finds a fault.
    """

    def __init__(self, config: DictConfig):
        super().__init__(config)
        self.aqn = parse_aqn(config)
        self.folder = folder_of(config)
        self.noise_metrics: dict[str, float] = {}
        self.synced_bytes = 0
        mxfp4 = self.aqn.mxfp4
        self.base = BaseRecords(
            config.actor_rollout_ref.model.path, mxfp4.rollout_weight_format, mxfp4.activation_arithmetic, self.event
        )
        self.slicing_of_rank: list[int] = []

    def begin_evidence(self) -> None:
        """Record the nodes of the run and the layout of the actor's batches."""
        # The judge decides σ again, from the records alone.
        schedule = schedule_of(self.config, self.total_training_steps)
        self.schedule, judged = (rule_of(self.aqn.noise, schedule) for _ in range(2))
        self.judge = Judge(
            lambda step: order_of(self.aqn.noise, judged, step),
            stage_at=judged.stage,
            noisy_actor=self.aqn.noise.in_actor,
            control=judged if isinstance(judged, ControlledSigma) else None,
        )
        for record in self.folder.read(EVIDENCE):  # records of earlier attempts, with which later ones must agree
            self.judge.add(record)
            if record["kind"] == "control" and isinstance(self.schedule, ControlledSigma):
                self.schedule.add(record["step"] - 1, record["measured"])
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

    def check_start(self) -> None:
        """Check what actor and rollout hold before anything is generated."""
        # Use the first step's order here, so that a pattern that matches nothing is reported at once.
        order = order_of(self.aqn.noise, self.schedule, 0)
        ranks = self.rollout("aqn_prepare", order.to_dict())
        norms, expected = ranks[0], expected_norms(self.config.actor_rollout_ref.model.path)
        self.check_ranks("rollout", ranks, rank_count=len(ranks), expected_norms=expected)
        compared = self.check_base("start")
        self.check_adapter()
        linears = f" and {norms['linears']} linear weights" if norms["linears"] else ""
        alone = f" ({len(norms['router_norms'])} of routers stay clean)" if norms["router_norms"] else ""
        self.event(f"{norms['norms']} norms{linears} found{alone}; adapter equal in actor and rollout")
        self.event(compared)

    def check_all_evidence(self) -> None:
        """Judge all records of the run once more, and look for missing ones; raise EvidenceError for a fault."""
        if faults := judge_run(self.folder, finished=True).faults:
            raise EvidenceError(f"the evidence of the run has a fault: {faults[0]}")

    def servers(self) -> list[Any]:
        """Return the server of every replica."""
        return [replica.servers[0] for replica in self.llm_server_manager.get_replicas()]

    def rollout(self, method: str, *args: Any, clear_cache: bool = False) -> list[dict]:
        """Call `method` on every rank of every replica, and return the answers."""
        servers = self.servers()
        answers = ray.get([server.aqn_call.remote(method, *args, clear_cache=clear_cache) for server in servers])
        return [answer for replica in answers for answer in replica]

    def apply_noise(self, step: int) -> None:
        """Write the noise of RL step `step` (from 0) on every replica, and check what the ranks read back."""
        order = order_of(self.aqn.noise, self.schedule, step)
        ranks = self.rollout("aqn_apply_noise", order.to_dict(), clear_cache=True)
        self.check_ranks("noise", ranks, stage=self.schedule.stage(step))
        self.rollout_noise = {f"rollout rank {rank}": evidence for rank, evidence in enumerate(ranks)}
        self.noise_metrics = {
            "aqn/sigma": order.sigma,
            "aqn/sigma_measured": ranks[0]["sigma_measured"],
            "aqn/stage": self.schedule.stage(step),
            "aqn/modules": ranks[0]["modules"],
        }

    def follow_target(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Record what σ of RL step `step` (from 0) was decided by, and the measurement that decides the next one.

        Return the figures of the step; {} without `aqn.noise.control`.
        """
        if not isinstance(self.schedule, ControlledSigma):
            return {}
        record = self.schedule.record(step, metrics)
        self.record("control", **record)
        self.schedule.add(step, record["measured"])
        if record["reason"]:
            self.warn(f"step {step + 1}: σ does not change after this step, because {record['reason']}")
        return {f"aqn/control/{key}": record[key] for key in ("target", "measured") if record[key] is not None}

    def restore_clean(self, when: str) -> None:
        """Write the clean weights on every replica, and check them bit for bit.

        `when`: the moment, as in `judge.records`.
        """
        self.check_ranks("clean", self.rollout("aqn_restore", clear_cache=True), when=when, at=self.global_steps)

    def apply_actor_noise(self, step: int) -> None:
        """Give the forward of every actor rank the rollout's noise of RL step `step`, and check it bit for bit."""
        order = order_of(self.aqn.noise, self.schedule, step)
        ranks = self.actor_rollout_wg.apply_noise(order.to_dict())
        self.check_ranks("actor noise", ranks)

    def restore_actor(self) -> None:
        """Remove the noise from the actor, and check that it was used."""
        ranks = self.actor_rollout_wg.restore_clean()
        self.check_ranks("actor clean", ranks, at=self.global_steps, sigma_used=self.noise_metrics["aqn/sigma"])

    def check_ranks(self, kind: str, ranks: list[dict], **more: Any) -> None:
        """Record and judge what each rank read back. Ranks with equal readings share one record."""
        records = [{**more, **evidence} for evidence in grouped(ranks)]
        self.folder.add_evidence(*({"kind": kind, **record} for record in records))
        for record in records:
            self.check_record(kind, record)

    def check_adapter(self) -> None:
        """Check that the rollout multiplies with the adapter that the actor sent."""
        first = not self.slicing_of_rank
        actual = self.rollout("aqn_adapter", first)
        if first:  # the first sync shows which parts of the adapter the ranks hold
            slices, sizes = ([answer.pop(key) for answer in actual] for key in ("slices", "sizes"))
            slicings, self.slicing_of_rank = distinct(slices)
            self.actor_rollout_wg.expect_slices(slicings)
            if missing := not_covered(slices, sizes[0].__getitem__):
                raise EvidenceError(f"the rollout's ranks together do not hold all of the adapter of {missing}")
        digests, self.synced_bytes = self.actor_rollout_wg.sent_adapters()[0]
        expected = [digests[slicing] for slicing in self.slicing_of_rank]
        # `whole`: every rank holds the whole adapter, so all digests are equal.
        whole, told = len(digests) == 1, {"sent": digests[0], "bytes": self.synced_bytes}
        ranks = [{"expected": one, **answer} for one, answer in zip(expected, actual, strict=True)]
        self.record("adapter", step=self.global_steps, whole=whole, **told, actual=grouped(ranks))

    def check_base(self, when: str) -> str:
        """Compare every frozen tensor of actor and rollout with the folder; return what was compared, in one line."""
        self.doing("base")  # the watchdog expects about the same time at the end as at the start
        began, servers = time.monotonic(), self.servers()
        pending = [server.aqn_call.remote("aqn_base_told", self.base.packed, clear_cache=False) for server in servers]
        actor = self.actor_rollout_wg.base()  # while the rollout reads its own base
        actual = with_tables(ray.get(pending), self._tables_of)
        ranks = {"actor": self.actor_rollout_wg.world_size, "rollout": self.actor_rollout_wg.world_size}
        record = self.base.record(when, actor, actual, ranks, began)
        self.record("base", **grouped_base(record))
        return sentence(record)

    def _tables_of(self, replica: int) -> list[dict]:
        return ray.get(self.servers()[replica].aqn_call.remote("aqn_base_tables", clear_cache=False))

    def write(self, name: str, **record: Any) -> None:
        self.folder.append(name, record)

    def record(self, kind: str, **evidence: Any) -> None:
        """Record evidence, and stop the run if it has a fault."""
        self.folder.add_evidence({"kind": kind, **evidence})
        self.check_record(kind, evidence)

    def check_record(self, kind: str, evidence: dict) -> None:
        """Raise EvidenceError if a record has a fault."""
        if fault := self.judge.add({"kind": kind, **evidence}):
            raise EvidenceError(f"{fault}; see evidence.jsonl")

    def event(self, text: str) -> None:
        self.write("events.jsonl", kind="phase", text=text, time=time.time())

    def doing(self, phase: str) -> None:
        """Record the phase that begins now; the watchdog measures its time."""
        self.write("events.jsonl", kind="doing", phase=phase, step=self.global_steps, time=time.time())

    def warn(self, text: str) -> None:
        self.write("events.jsonl", kind="warning", text=text)
