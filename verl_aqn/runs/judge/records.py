"""The judge of a run's evidence. The trainer uses it for each new record, and `report` and others use it afterwards.

`Judge.add` says what is wrong with a record; `Judge.missing` lists records that should exist and do not. A record is
right only if it has all required fields, with the expected values, and agrees with the records before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_aqn.errors import AqnError, EvidenceError
from verl_aqn.noise.checks import (
    OLD_FIELDS,
    check_equal_noise,
    check_evidence,
    check_norms,
    check_old_reading,
    check_used,
)
from verl_aqn.noise.control import ControlledSigma
from verl_aqn.noise.spec import NoiseSpec, count_layers
from verl_aqn.runs.judge.base_record import check_base, is_old
from verl_aqn.runs.judge.mismatch import check_mismatch
from verl_aqn.runs.judge.noise_use import check_effect, floor_of
from verl_aqn.runs.judge.ranks import by_rank, wide_base
from verl_aqn.runs.judge.sigma_control import check_control

VERSION = 2
"""Version of the evidence. Version 1 (no field `evidence` in `placed`) lacks some records that `Judge.missing` wants.
"""

Record = Mapping[str, Any]
VALIDATION, RESCORING, END = "validation", "rescoring", "end"
"""The moments at which the clean norms are written back to the rollout."""

IDENTITY: dict[str, tuple[str, ...]] = {
    "placed": (),
    "layout": (),
    "rollout": ("rank",),
    "base": ("when",),
    "adapter": ("step",),
    "noise": ("step", "rank"),
    "clean": ("when", "at", "rank"),
    "actor noise": ("step", "rank"),
    "actor clean": ("at", "rank"),
    "mismatch": ("step",),
    "use": ("step",),
    "control": ("step",),
    "adapter use": ("step",),
    "requests": ("when",),
    "strength": (),
    "stopped": ("reason",),
}
"""The kinds of records that are judged, and the fields that identify a record of each kind within one attempt.

A record with a list `ranks` instead of `rank` stands for all of these ranks, whose readings are equal.
"""

START = ("placed", "layout", "rollout", "base", "adapter")
"""The kinds of records that must exist before anything is generated."""


class Missing(KeyError):
    """A record lacks a required field."""


class Fields(dict[str, Any]):
    """A record that raises `Missing` for a field that is absent or None."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: _fields(value) for key, value in values.items()})

    def __missing__(self, key: str) -> Any:
        raise Missing(key)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None:
            raise Missing(key)
        return value


def _fields(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Fields(value)
    return [_fields(one) for one in value] if isinstance(value, list | tuple) else value


@dataclass
class Tally:
    """Result for the records of one kind: how many were right, the faults of the others, how many cannot be judged."""

    right: int = 0
    faults: list[str] = field(default_factory=list)
    unknown: int = 0


@dataclass(frozen=True)
class Done:
    """What a run did according to its other records, not its evidence; steps count from 1."""

    steps: Collection[int]
    validations: Collection[int]
    rescored: Collection[int]
    finished: bool


class Judge:
    """Judges the records of one run, in the order in which they were written.

    Args:
        order_at: returns the noise order of the run's config for RL step n (from 0); None if the config is not known.
            With `control` its σ is that of `control`.
        stage_at: returns the stage of RL step n; None if it is not known.
        sigmas: σ by RL step from the run's schedule, for records of older versions.
        noisy_actor: whether the actor has the rollout's noise.
        whole: whether the records are of `VERSION`. In older records an absent field or record is not a fault.
        control: the controller of σ, if the config has one; the judge adds the measurements on record to it.
    """

    def __init__(
        self,
        order_at: Callable[[int], NoiseSpec] | None,
        *,
        stage_at: Callable[[int], int] | None = None,
        sigmas: Sequence[float] = (),
        noisy_actor: bool = False,
        whole: bool = True,
        control: ControlledSigma | None = None,
    ) -> None:
        self.start: tuple[str, ...] = START
        self.order_at, self.stage_at, self.sigmas = order_at, stage_at, sigmas
        self.noisy_actor, self.whole, self.control = noisy_actor, whole, control
        self.tallies: dict[str, Tally] = {}
        self.seen: set[tuple] = set()  # identities of the records of all attempts
        self._attempt: set[tuple] = set()  # and those of the last attempt
        self._started = False  # whether the last attempt has all records that `START` names
        self.rollout_ranks = self.actor_ranks = 0
        self.clean_digest: str | None = None
        self._names: set[str] = set()
        self._sizes: dict[str, int] = {}  # sizes of the clean readings
        self._first_base: Record | None = None  # the first of the run
        self._base_at_start: Record | None = None  # the one at the start of this attempt
        self._last_adapter: Record | None = None
        self._last_sync: int | None = None  # step of the last sync in this attempt
        self._sent: dict[int, str] = {}  # the newest adapter that was right after each step
        self._bounds: tuple | None = None
        self._last_mismatch = 0.0
        self._quiet: list[float] = []  # effects at σ = 0
        self._readings: dict[str, dict[int, Record]] = {"noise": {}, "actor noise": {}}
        self._digest_of_step: dict[str, int] = {}

    def add(self, record: Record) -> str | None:
        """Judge the next record. Return its fault in one line, or None if it has none."""
        kind = str(record.get("kind"))
        if kind not in IDENTITY:
            return None
        tally = self.tallies.setdefault(kind, Tally())
        # The judge of the base distinguishes null from absent.
        fault = self._fault(kind, dict(record) if kind == "base" else Fields(record))
        if fault is None:
            tally.right += 1
            return None
        if fault == "":
            tally.unknown += 1
            return None
        tally.faults.append(fault)
        return fault

    def _fault(self, kind: str, record: Record) -> str | None:
        """Return the fault of a record, None if it has none, or "" if a record of an older version lacks the fields."""
        try:
            if kind == "placed":
                self._begin()
            self._once(kind, record)
            getattr(self, "_on_" + kind.replace(" ", "_"))(record)
        except Missing as error:
            return f"{_name(kind, record)} does not say {error.args[0]!r}" if self.whole else ""
        except AqnError as error:
            return str(error)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, ArithmeticError) as error:
            return f"{_name(kind, record)} cannot be read ({type(error).__name__}: {error})"
        return None

    def _begin(self) -> None:
        """Begin a new attempt; raise if the attempt before has no record but `placed`."""
        before, self._attempt, self._base_at_start, self._last_sync = self._attempt, set(), None, None
        self._started = False
        if self.whole and before == {("placed",)}:
            raise EvidenceError("the record of the run's nodes (placed) occurs twice")

    def _once(self, kind: str, record: Record) -> None:
        keys = self._keys(kind, record)
        if not self.whole:
            self.seen |= keys
            return
        if keys & self._attempt:
            raise EvidenceError(f"{_name(kind, record)} occurs twice: one of them belongs to another step or rank")
        if kind not in (*self.start, "strength", "stopped") and (lacking := self._lacking_at_start()):
            raise EvidenceError(f"{_name(kind, record)} comes before the first record of {lacking}")
        self._attempt |= keys
        self.seen |= keys

    def _keys(self, kind: str, record: Record) -> set[tuple]:
        """Return the record's identities among the records of its kind, one for each of its ranks."""
        parts = IDENTITY[kind]
        if "rank" not in parts:
            return {(kind, *(record.get(part) if not self.whole else record[part] for part in parts))}
        told = {part: record.get(part) if not self.whole else record[part] for part in parts if part != "rank"}
        ranks = _ranks(record) if self.whole or "ranks" in record else [record.get("rank")]
        keys = {(kind, *(rank if part == "rank" else told[part] for part in parts)) for rank in ranks}
        if not keys or len(keys) < len(ranks):
            raise EvidenceError(f"{_name(kind, record)} names no rank, or one rank twice")
        return keys

    def _lacking_at_start(self) -> str:
        if self._started:
            return ""
        lacking = self._first_lacking()
        self._started = not lacking
        return lacking

    def _first_lacking(self) -> str:
        there = {key[0] for key in self._attempt}
        if lacking := [kind for kind in self.start if kind not in there]:
            return lacking[0]
        ranks = [rank for rank in range(self.rollout_ranks) if ("rollout", rank) not in self._attempt]
        return f"rollout rank {ranks[0]}" if ranks else ""

    # ---- one kind each ----

    def _on_placed(self, record: Fields) -> None:
        nodes = record["actor_nodes"], record["rollout_nodes"]
        if not all(names and all(isinstance(name, str) and name for name in names) for names in nodes):
            raise EvidenceError("the record of the run's nodes names no node of the actor or of the rollout")
        self.actor_ranks = len(record["actor_nodes"])
        if self.whole and record["evidence"] != VERSION:
            raise EvidenceError(f"the evidence of this attempt has version {record['evidence']}, expected {VERSION}")

    def _on_layout(self, record: Fields) -> None:
        if not isinstance(record["layout"], str) or not record["layout"]:
            raise EvidenceError("the record of the layout does not name the layout of the actor's batches")

    def _on_rollout(self, record: Fields) -> None:
        digest = self.clean_digest or record["clean_digest"]
        if record["clean_digest"] != digest:
            raise EvidenceError("the ranks or attempts of the rollout started with different clean norms")
        self.clean_digest = digest
        names = record["names"]
        if record["norms"] > len(names) or record["norms"] < 0:
            raise EvidenceError(f"the rollout counts {record['norms']} norms, but names {len(names)}")
        order = self.order_at(0) if self.order_at else None
        if order and ("expected_norms" in record or self.whole):
            check_norms(record["expected_norms"], [record], order)
        if len(set(names)) < len(names) or (self._names and set(names) != self._names):
            raise EvidenceError("the ranks or attempts of the rollout name different norms")
        self._names = set(names)
        if self.whole:
            ranks, rank = record["rank_count"], _ranks(record)[0]
            multipliers, texts = record["multipliers"], [record[key] for key in ("vllm", "dtype")]
            told = all(isinstance(text, str) and text for text in texts) and record["linears"] >= 0
            told &= all(value > 0 for value in multipliers) and bool(multipliers or not (order and order.targets))
            if not told or not set(record["router_norms"]) <= set(names):
                raise EvidenceError(f"rollout rank {rank} does not say what it would do with a noise order")
            if not _are_of(record, ranks) or (self.rollout_ranks and self.rollout_ranks != ranks):
                raise EvidenceError(f"rollout rank {rank} reports {ranks} ranks, which contradicts the other ranks")
            self.rollout_ranks = ranks

    def _on_base(self, record: Record) -> None:
        when = record["when"]
        if when not in ("start", "end"):
            raise EvidenceError(f"the base was compared at {when!r}, expected 'start' or 'end'")
        if not self.whole and is_old(record):
            _check_packed_base(Fields(record))
            return
        record = wide_base(record)
        check_base(record, self._base_at_start if when == "end" else None)
        ranks = {"actor": self.actor_ranks, "rollout": self.rollout_ranks}
        if self.whole and record["ranks"] != ranks:
            raise EvidenceError(f"at the {when} the base was compared on {dict(record['ranks'])} ranks, not on all")
        first = self._first_base = self._first_base or record
        if any(record.get(key) != first.get(key) for key in ("expected", "disk", "actor_digests")):
            raise EvidenceError(f"at the {when} the base differs from that of the run's first attempt")
        if when == "start":
            self._base_at_start = record

    def _on_adapter(self, record: Fields) -> None:
        sent, actual = record["sent"], record["actual"]
        if not actual:
            raise EvidenceError(f"after step {record['step']} no rank of the rollout reported its adapter")
        digests = [answer["adapter_digest"] for answer in actual]
        if not self.whole:
            # `sent` is the digest of what the first rank holds; other ranks may hold other slices.
            if digests[0] != sent:
                raise EvidenceError(f"after step {record['step']} the rollout's adapter is not the one that was sent")
            return
        step = record["step"]
        if any("ranks" in answer for answer in actual):
            actual = [Fields(answer) for answer in by_rank(actual, "rollout")]
            digests, expected = ([answer[key] for answer in actual] for key in ("adapter_digest", "expected"))
        else:
            expected = record["expected"]
        if step < 0 or (self._last_sync is not None and step != self._last_sync + 1):
            raise EvidenceError(f"there is a sync of step {step}, but the sync before it was of step {self._last_sync}")
        if self._last_sync is None and step and self._sent.get(step, sent) != sent:
            raise EvidenceError(
                f"the run was resumed from step {step} with another adapter than it had after that step: its "
                "checkpoint was not loaded, or was exchanged"
            )
        self._last_sync = step
        if self.rollout_ranks == 1 and not record["whole"]:
            raise EvidenceError(f"after step {step} the only rank of the rollout holds just a part of the adapter")
        if len(actual) != self.rollout_ranks or len(expected) != self.rollout_ranks:
            raise EvidenceError(
                f"after step {record['step']} {len(actual)} of {self.rollout_ranks} ranks reported their adapter"
            )
        if digests != expected or (record["whole"] and set(expected) != {sent}):
            raise EvidenceError(f"after step {record['step']} the rollout's adapter is not the one that was sent")
        modules = {answer["modules"] for answer in actual}
        before = self._last_adapter
        if min(modules) < 1 or record["bytes"] < 1 or len(modules) > 1:
            raise EvidenceError(f"after step {record['step']} the adapter in the rollout has {sorted(modules)} modules")
        if before and (before["actual"][0]["modules"] not in modules or before["bytes"] != record["bytes"]):
            raise EvidenceError(f"after step {record['step']} the size of the adapter has changed")
        if not all(0 <= answer["b_max"] < float("inf") for answer in actual):
            raise EvidenceError(f"after step {record['step']} the adapter in the rollout is not finite")
        self._last_adapter, self._sent[step] = record, sent

    def _noise_of(self, kind: str, record: Fields) -> None:
        step = record["step"]
        if not self.whole:
            self._old_reading(record, self.sigmas[step] if step < len(self.sigmas) else record["sigma_target"])
            return
        if self.order_at is None:
            raise EvidenceError(f"step {step} has noise, but the noise settings of the run's config are not known")
        order = self.order_at(step)
        self._check_rank(record, self.actor_ranks if kind == "actor noise" else self.rollout_ranks)
        if kind == "noise" and self.stage_at and record["stage"] != self.stage_at(step):
            raise EvidenceError(
                f"step {step} belongs to stage {self.stage_at(step)}, but the record says stage {record['stage']}"
            )
        check_evidence(record, order, self._clean_digest())
        self._check_modules(record, order)
        same = self._readings[kind].setdefault(step, record)
        if kind == "actor noise":
            same = self._readings["noise"].get(step, same)
        check_equal_noise({"rollout rank 0": same, f"{kind} of rank {_ranks(record)[0]}": record})
        if order.sigma and "norm" in order.targets:
            other = self._digest_of_step.setdefault(record["weights_digest"], step)
            if other != step:
                raise EvidenceError(f"step {step} has the noise of step {other}: no new noise was drawn")

    def _check_modules(self, record: Fields, order: NoiseSpec) -> None:
        """Check that exactly the norms that the order selects have noise, or, if σ is 0, that every norm was read."""
        self._check_layers(record)
        routers = set() if order.router_norms else set(record["router_norms"])
        if not routers <= self._names:
            raise EvidenceError(
                f"the record names {min(routers - self._names)} as a router's norm, but the rollout has no such norm"
            )
        expected = {
            name
            for name in self._names - routers
            if "norm" in order.targets
            and order.selects(name)
            and order.layers.multiplier_of(name, record["layers"], order.share) > 0
        }
        if not order.sigma:
            linear = "linear" in order.targets
            count = len(expected) or len(self._names)
            if record["modules"] < count or (record["modules"] > count and not linear):
                raise EvidenceError(f"{record['modules']} modules were read, expected {count} norms")
            if not linear:  # with linear layers, a reading contains those that had noise before, so its size varies
                self._same("elements of all norms", record["elements"])
            return
        actual = [name for group in record["groups"] if group["kind"] == "norm" for name in group["modules"]]
        if sorted(actual) != sorted(expected):
            name = min(set(actual) ^ expected, default="one norm")
            raise EvidenceError(
                f"step {record['step']}: {name} should have noise and has none, or the other way round ({len(actual)} "
                f"norms with noise, {len(expected)} expected)"
            )

    def _check_layers(self, record: Fields) -> None:
        if record["layers"] != (layers := count_layers(self._names)):
            raise EvidenceError(
                f"the record counts {record['layers']} layers, but the names of the norms give {layers}"
            )

    def _same(self, what: str, count: int) -> None:
        """Check that a count is the same as in all readings before."""
        if self._sizes.setdefault(what, count) != count or (count < 1 and self._names):
            raise EvidenceError(f"{count} {what} were read back, but {self._sizes[what]} before")

    def _check_rank(self, record: Fields, ranks: int) -> None:
        if not _are_of(record, ranks):
            raise EvidenceError(f"{_name(record['kind'], record)} names a rank that is not among the {ranks} ranks")

    def _check_clean(self, record: Fields, ranks: int) -> None:
        self._check_rank(record, ranks)
        check_evidence(record, None, self._clean_digest())
        linear = self.order_at is not None and "linear" in self.order_at(0).targets
        modules, norms = record["modules"], len(self._names)
        if modules < norms or (modules > norms and not linear) or not set(record["router_norms"]) <= self._names:
            raise EvidenceError(f"{record['modules']} of {len(self._names)} norms were read back as clean")
        if not {"step", "order"} <= set(record) or record["unit"] != "absolute":
            raise EvidenceError("a reading of clean norms does not say that no order was given")
        if not linear:
            self._same("elements of all norms", record["elements"])
        self._check_layers(record)

    def _on_noise(self, record: Fields) -> None:
        self._noise_of("noise", record)

    def _on_actor_noise(self, record: Fields) -> None:
        self._noise_of("actor noise", record)

    def _on_clean(self, record: Fields) -> None:
        if not self.whole:
            self._old_reading(record, 0.0)
            return
        if record["when"] not in (VALIDATION, RESCORING, END):
            raise EvidenceError(f"a reading of clean norms is from an unknown moment: {record['when']!r}")
        self._check_clean(record, self.rollout_ranks)

    def _on_actor_clean(self, record: Fields) -> None:
        if not self.whole:
            self._old_reading(record, 0.0)
            return
        sigma = record["sigma_used"]
        if self.order_at and sigma != self.order_at(record["at"] - 1).sigma:
            raise EvidenceError(f"the actor's noise of step {record['at']} had σ {sigma:g}, which was not ordered")
        check_used(record, sigma)
        self._check_clean(record, self.actor_ranks)

    def _old_reading(self, record: Fields, sigma: float) -> None:
        check_old_reading(record, sigma, self.clean_digest)
        for key in OLD_FIELDS:
            record[key]

    def _on_mismatch(self, record: Fields) -> None:
        source = record.get("source")
        if "source" in record and source is None and record["reason"]:
            return  # a step that cannot be compared, with the reason
        if self.whole and source not in ("sampled", "rescored"):
            raise EvidenceError(f"step {record['step']}: the tokens of the mismatch have an unknown source: {source!r}")
        check_mismatch(record)
        bounds = record["warn"], record["stop"]
        if self._bounds not in (None, bounds):
            raise EvidenceError(
                f"step {record['step']}: the bounds of the mismatch are {bounds}, but were {self._bounds} before"
            )
        self._bounds, self._last_mismatch = bounds, record["abs_dlogp_mean"]

    def _on_use(self, record: Fields) -> None:
        if self.order_at and self.order_at(record["step"] - 1).sigma != record["sigma"]:
            raise EvidenceError(f"the use of noise in step {record['step']} was measured at a σ that was not ordered")
        check_effect(record)
        if record["sigma"] == 0:
            self._quiet.append(record["effect"])
        floor = floor_of(self._last_mismatch, self._quiet)
        if not math.isclose(record["floor"], floor, rel_tol=1e-6, abs_tol=1e-9):
            raise EvidenceError(
                f"step {record['step']}: the noise is compared with {record['floor']:g} nats per token, but the "
                f"records give {floor:g}"
            )

    def _on_control(self, record: Fields) -> None:
        check_control(record, self.control)

    def _on_strength(self, record: Fields) -> None:
        for one in (record["clean"], record["noisy"]):
            for key in ("kl", "entropy"):
                middle, low, high = one[key]
                if not low <= high or not -1e-6 <= middle < float("inf"):
                    raise EvidenceError(f"the probe's {key} is {middle} [{low}, {high}], which is not a measurement")

    def _on_stopped(self, record: Fields) -> None:
        raise EvidenceError(f"the run was stopped: {record['reason']}")

    def _clean_digest(self) -> str:
        if self.clean_digest is None:
            raise EvidenceError("there is no record of the rollout's clean norms")
        return self.clean_digest

    # ---- missing records ----

    def missing(self, done: Done) -> Iterator[tuple[str, str]]:
        """Yield (kind, what) for every record that should exist and does not."""
        if not self.whole:
            yield from self._old_missing(done)
            return
        for kind in self.start:
            if kind not in {key[0] for key in self.seen} and (done.steps or done.validations):
                yield kind, f"no record of {kind}"
        yield from self._missing_later(done)

    def _missing_later(self, done: Done) -> Iterator[tuple[str, str]]:
        """Yield the missing records of steps, validations and the end of the run."""
        rollout, actor = range(max(1, self.rollout_ranks)), range(max(1, self.actor_ranks))
        wanted: list[tuple] = []
        for step in done.steps:
            wanted += [("noise", step - 1, rank) for rank in rollout]
            wanted += [("adapter", step), ("mismatch", step), *([("control", step)] if self.control else [])]
            if self.noisy_actor:
                wanted += [
                    (kind, step - at, rank) for rank in actor for kind, at in (("actor noise", 1), ("actor clean", 0))
                ]
        for step in done.rescored:
            wanted += [("use", step), *(("clean", RESCORING, step, rank) for rank in rollout)]
        for step in done.validations:
            wanted += [("clean", VALIDATION, step, rank) for rank in rollout]
        if done.finished:
            wanted += [("base", "end")]
            ends = {key[2] for key in self.seen if key[:2] == ("clean", END)}
            last = max([*done.steps, *done.validations], default=0)
            if not ends or not {one - last for one in ends} <= {0, 1}:  # verl's counter may be one ahead
                yield "clean", "no record of clean norms at the end of the run"
        yield from self._absent(wanted)

    def _old_missing(self, done: Done) -> Iterator[tuple[str, str]]:
        """Yield the missing records that older versions wrote too; their clean readings have no moment."""
        wanted: list[tuple] = [("base", "start")] if done.steps or done.validations else []
        wanted += [("base", "end")] if done.finished else []
        for step in done.steps:
            wanted += [("noise", step - 1, 0), ("adapter", step)]
        yield from self._absent(wanted)
        tally = self.tallies.get("clean", Tally())
        if (read := tally.right + tally.unknown + len(tally.faults)) < len(done.validations):
            yield "clean", f"{read} readings of clean norms for {len(done.validations)} validations"

    def _absent(self, wanted: Iterable[tuple]) -> Iterator[tuple[str, str]]:
        for key in wanted:
            if key not in self.seen:
                names = IDENTITY[key[0]]
                where = ", ".join(f"{name} {value}" for name, value in zip(names, key[1:], strict=True))
                yield key[0], f"no record of {key[0]} for {where}"


def _check_packed_base(record: Fields) -> None:
    """Raise unless a record of an older version, which compared packed modules only, shows them to be equal."""
    if record.get("quantised") is False:
        raise Missing("a comparison of the 16-bit base")
    disk, actor, rollout = record["disk"], record["actor"], record["rollout"]
    served = record.get("served") or disk
    if not actor or not rollout or set(actor) != {disk}:
        raise EvidenceError(f"at the {record['when']} the MXFP4 base of the actor differs from the one on disk")
    if any(one.get("base_digest") != served for one in rollout if not one.get("slices")):
        raise EvidenceError(f"at the {record['when']} the MXFP4 base of the rollout differs from the one on disk")
    if any(one.get("weights_equal_base") is False for one in rollout):
        raise EvidenceError(f"at the {record['when']} the rollout computes with weights that are not its MXFP4 base")


def _ranks(record: Record) -> list[int]:
    """Return the ranks that a record stands for."""
    return record["ranks"] if "ranks" in record else [record["rank"]]


def _are_of(record: Record, count: int) -> bool:
    """Return whether all of a record's ranks are in 0 … `count` - 1."""
    return all(type(rank) is int and 0 <= rank < count for rank in _ranks(record))


def _name(kind: str, record: Record) -> str:
    """Return a record's kind and identity, for an error message."""
    if "rank" in IDENTITY[kind] and record.get("ranks"):
        record = {**record, "rank": record["ranks"][0]}
    told = [f"{part} {record.get(part)}" for part in IDENTITY[kind] if record.get(part) is not None]
    return f"the record of {kind}" + (f" ({', '.join(told)})" if told else "")
