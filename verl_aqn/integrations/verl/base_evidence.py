"""Build the records of kind `base` (`verl_aqn.runs.judge.base_record`) from what disk.

Actor and rollout hold of the base.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_aqn.checkpoints.disk_base import DiskBase, Part, rounds
from verl_aqn.checkpoints.packing import combined_digest
from verl_aqn.checkpoints.slices import NOTHING, Slices, not_covered
from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4.int8_change import summary
from verl_aqn.runs.judge.base_record import GROUPS, SHOWN, SIDES

TABLES = ("tensors", "computed", "lost", "slices")
"""Fields of a rollout rank's answer with an entry for every tensor. Most ranks have equal tables, so few are sent."""
WHOLE = Part("packed")
PACKED_FORMS = ("packed", "bf16", "int8")


class BaseRecords:
    """The builder of one attempt's records.

    The digests of the folder from the start are used again at the end if the files have not changed.

    `form`: the form in which the rollout holds a packed base, "packed", "bf16" or "int8". `activation`: see
    `MxConfig.activation_arithmetic`. `report` is called with the progress of a long comparison.
    """

    def __init__(self, path: str | Path, form: str, activation: str, report: Callable[[str], None]):
        self.disk = DiskBase(path)
        self.form = form if self.disk.quantised else "bf16"
        self.activation = activation if self.disk.quantised else "none"
        self.report = report

    @property
    def packed(self) -> list[str]:
        """Return the names of the folder's packed modules."""
        return [name for name, group in self.disk.groups.items() if group == "packed"]

    def record(
        self,
        when: str,
        actor: Sequence[Mapping[str, Any]],
        rollout: Sequence[Mapping[str, Any]],
        ranks: Mapping[str, int],
        began: float | None = None,
    ) -> dict[str, Any]:
        """Return the record for one moment, from the answers of all ranks of the actor and of the rollout.

        Ranks of the rollout with equal tables (`TABLES`) are compared only once.

        `began`: the time (`time.monotonic`) at which the ranks were asked; the record's `seconds` counts from then.
        """
        began = time.monotonic() if began is None else began
        disk = self.disk
        way_of, first_ranks = _ways(rollout)
        ways = [rollout[rank] for rank in first_ranks]
        first = {f"rollout {way}": f"rollout {rank}" for way, rank in enumerate(first_ranks)}
        alike = Counter(way_of)
        tables = [dict(answer["tensors"]) for answer in ways]
        parts: dict[str, dict[str, Part]] = {"actor": {n: Part(form) for n, (_, form) in actor[0]["tensors"].items()}}
        found = {"actor": {name: digest for name, (digest, _) in actor[0]["tensors"].items()}}
        for way, tensors in enumerate(tables):
            parts[f"rollout {way}"] = {n: Part(f, tuple(s) if s else None) for n, (_, f, _, s) in tensors.items()}
            found[f"rollout {way}"] = {name: digest for name, (digest, *_) in tensors.items()}
        differ = [
            {"holder": f"actor rank {rank}" if rank else "actor", "name": fault.split()[0].rstrip(","), "fault": fault}
            for rank, answer in enumerate(actor)
            for fault in answer["faults"]
        ]

        def tell(holder: str, name: str, fault: str) -> None:
            others = alike[int(holder.split()[1])] - 1 if holder in first else 0
            fault += f" (and {others:,} more ranks)" if others else ""
            differ.append({"holder": first.get(holder, holder), "name": name, "fault": fault})

        wanted: dict[str, set[Part]] = {}
        for holder, of in parts.items():
            for name, part in list(of.items()):
                if name in disk.groups and (part.form in PACKED_FORMS) == (disk.groups[name] == "packed"):
                    wanted.setdefault(name, set()).add(part)
                    continue
                del of[name]
                how = f" as {part.form}" if name in disk.groups else ""
                tell(holder, name, f"the folder does not have this tensor{how}")
        for name, group in disk.groups.items():
            whole = {WHOLE, Part(self.form)} if group == "packed" else {Part(disk.dtypes[name])}
            if group in ("packed", "head", "embeddings"):
                wanted.setdefault(name, set()).update(whole)
        digests, read = disk.digests(wanted, self._tell)
        left = _Left(self, actor[0], ways, parts, digests)
        compared: dict[str, list[str]] = {}
        for holder, of in parts.items():
            side = holder.split()[0]
            compared[holder] = []
            for name, part in of.items():
                if name in left.of[side]:
                    continue
                compared[holder].append(name)
                if found[holder][name] != digests[(name, part)]:
                    tell(holder, name, _fault(found[holder][name], part))
        differ += left.missing
        files, size = disk.size
        groups = {
            (holder, kernel): self._groups(holder, compared, found, parts, digests, tables, left, kernel)
            for holder in parts
            for kernel in (False, True)
        }
        holders = {"actor": groups["actor", False]} | {
            f"rollout {rank}": groups[f"rollout {way}", rollout[rank]["weights_equal_base"] is True]
            for rank, way in enumerate(way_of)
        }
        converted = {holder: self._converted(compared[holder], parts[holder]) for holder in parts}
        alone = {
            holder: combined_digest((n, found[holder][n]) for n in of if n in left.of[holder.split()[0]])
            for holder, of in parts.items()
        }
        sliced = [_sliced(answer["slices"]) for answer in ways]
        record = {
            "when": when,
            "quantised": disk.quantised,
            "form": self.form,
            "activation": self.activation,
            "ranks": dict(ranks),
            "expected": self._expected(),
            **self._packed_digests(actor, digests),
            "actor_digests": [answer["digest"] for answer in actor],
            "actor_activations": [answer["activations"] for answer in actor],
            "rollout": [
                {k: v for k, v in answer.items() if k not in (*TABLES, "told")} | {"sliced": sliced[way]}
                for answer, way in zip(rollout, way_of, strict=True)
            ],
            "holders": holders,
            "converted": _of_ranks(converted, way_of),
            "not_compared": left.listed(),
            "left": _of_ranks(alone, way_of),
            "differ": differ[:SHOWN],
            "uncovered": self._uncovered(tables),
            **({"int8": summary(disk.changes)} if self.form == "int8" else {}),
            "files": {"files": files, "bytes": size, "tensors": read, "read": "now" if read else "at the start"},
        }
        return record | {"seconds": round(time.monotonic() - began, 2)}

    def _tell(self, done: float) -> None:
        self.report(f"comparing the base with its folder: {done:.0%} read")

    def _expected(self) -> dict[str, int]:
        counts = Counter(self.disk.groups.values())
        return {group: counts[group] for group in GROUPS if counts[group]}

    def _packed_digests(
        self, actor: Sequence[Mapping[str, Any]], digests: Mapping[tuple[str, Part], str]
    ) -> dict[str, Any]:
        if not self.disk.quantised:
            return {}
        disk, served = (
            combined_digest((name, digests[(name, part)]) for name in self.packed) for part in (WHOLE, Part(self.form))
        )
        return {"disk": disk, "served": served, "actor": [answer["packed_digest"] for answer in actor]}

    def _groups(
        self,
        holder: str,
        compared: Mapping[str, list[str]],
        found: Mapping[str, Mapping[str, str]],
        parts: Mapping[str, Mapping[str, Part]],
        digests: Mapping[tuple[str, Part], str],
        tables: Sequence[Mapping[str, Any]],
        left: "_Left",
        kernel: bool,
    ) -> dict[str, dict[str, Any]]:
        """Return for each group what ``holder`` holds, and what the folder holds of the same parts.

        ``kernel``: whether its kernels were found to compute with the packed weights that were loaded.
        """
        side, _, way = holder.partition(" ")
        groups: dict[str, dict[str, Any]] = {}
        for group, count in self._expected().items():
            names = [name for name in compared[holder] if self.disk.groups[name] == group]
            live = len(names)
            if side == "rollout":
                live = sum(bool(tables[int(way)][name][2]) for name in names)
                if group == "packed" and kernel:
                    live = len(names)
            elsewhere = 0
            if side == "rollout":
                elsewhere = count - len(names) - sum(self.disk.groups[name] == group for name in left.of[side])
            groups[group] = {
                "tensors": len(names),
                "elsewhere": elsewhere,
                "live": live,
                "actual": combined_digest((name, found[holder][name]) for name in names),
                "disk": combined_digest((name, digests[(name, parts[holder][name])]) for name in names),
            }
        return groups

    def _converted(self, names: Iterable[str], parts: Mapping[str, Part]) -> dict[str, int]:
        changes = Counter(
            f"{self.disk.dtypes[name]} → {parts[name].form}"
            for name in names
            if name in self.disk.dtypes and rounds(self.disk.dtypes[name], parts[name].form)
        )
        return dict(changes)

    def _uncovered(self, tables: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the first tensor that the ranks of the rollout hold only in part, as a list, or []."""
        names = dict.fromkeys(name for tensors in tables for name in tensors)
        slices: list[Slices] = [
            {name: part for name in names if (part := tensors[name][3] if name in tensors else NOTHING)}
            for tensors in tables
        ]
        missing = not_covered(slices, lambda name: self.disk.elements.get(name, 0))
        return [missing] if missing else []


class _Left:
    """The tensors that are not compared, with reasons.

    `of`: for each side {name: (code, reason)}. `missing`: faults for tensors that only one side holds.
    """

    def __init__(
        self,
        records: BaseRecords,
        actor: Mapping[str, Any],
        rollout: Sequence[Mapping[str, Any]],
        parts: Mapping[str, Mapping[str, Part]],
        digests: Mapping[tuple[str, Part], str],
    ):
        self.disk = disk = records.disk
        self.of: dict[str, dict[str, tuple[str, str]]] = {side: {} for side in SIDES}
        self.missing: list[dict[str, str]] = []
        ranks = {holder: of for holder, of in parts.items() if holder != "actor"}
        embeddings = {
            digests[(name, Part(disk.dtypes[name]))]: name
            for name, group in disk.groups.items()
            if group == "embeddings" and name in parts["actor"] and any(name in of for of in ranks.values())
        }
        passed = set(actor["passed"])
        for name, group in disk.groups.items():
            in_actor, holders = name in parts["actor"], [holder for holder, of in ranks.items() if name in of]
            converted = actor["converted"].get(name)
            lost = next((answer["lost"][name] for answer in rollout if name in answer["lost"]), None)
            lost = lost if lost and not holders else None
            tied = embeddings.get(digests[(name, Part(disk.dtypes[name]))]) if group == "head" else None
            if not in_actor:
                if tied:
                    self.of["actor"][name] = ("tied", f"tied to {tied}")
                elif name in passed:
                    self.of["actor"][name] = ("other part", "not a part of the text model")
                elif converted:
                    self.of["actor"][name] = ("converted", f"transformers converts it into another tensor: {converted}")
                elif holders or lost:
                    self._miss("actor", name, "the rollout holds it, but the actor does not")
                else:
                    self.of["actor"][name] = ("unused", "neither the actor nor the rollout holds it")
            if not holders:
                if tied:
                    self.of["rollout"][name] = ("tied", f"tied to {tied}")
                elif lost:
                    self.of["rollout"][name] = ("lost", f"its way into vLLM cannot be followed ({lost})")
                elif name in passed:
                    self.of["rollout"][name] = ("other part", "not a part of the text model")
                elif in_actor or converted:
                    self._miss("rollout", name, "the actor holds it, but the rollout does not")
                else:
                    self.of["rollout"][name] = ("unused", "neither the actor nor the rollout holds it")
                continue
            how = {rollout[int(h.split()[1])]["computed"].get(name) for h in holders}
            wrong = [
                holder
                for holder in holders
                if rollout[int(holder.split()[1])]["tensors"][name][0] != digests[(name, ranks[holder][name])]
            ]
            if wrong and None not in how and group in ("other", "biases"):
                self.of["rollout"][name] = ("computed", f"vLLM computes another tensor from it: {sorted(how)[0]}")

    def _miss(self, side: str, name: str, fault: str) -> None:
        self.missing.append({"holder": side, "name": name, "fault": fault})
        self.of[side][name] = ("missing", fault)

    def listed(self) -> list[dict[str, Any]]:
        """Return the tensors that are not compared, by side, group and reason: their number and the first names."""
        found: dict[tuple[str, str, str, str], list[str]] = {}
        for side, names in self.of.items():
            for name, (code, reason) in names.items():
                found.setdefault((side, self.disk.groups[name], code, reason), []).append(name)
        return [
            {
                "side": side,
                "group": group,
                "code": code,
                "reason": reason,
                "tensors": len(names),
                "names": names[:SHOWN],
            }
            for (side, group, code, reason), names in found.items()
        ]


def table_digest(answer: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of the tables in a rank's answer."""
    tables = {key: answer[key] for key in TABLES}
    return hashlib.sha256(json.dumps(tables, sort_keys=True, default=list).encode()).hexdigest()


def with_tables(
    replicas: Sequence[Sequence[Mapping[str, Any]]], tables_of: Callable[[int], Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the answers of all ranks, each with its tables.

    Args:
        replicas: the answers of each replica's ranks, without tables; `told` is the digest of a rank's tables.
        tables_of: returns the tables of a replica's ranks; called only for replicas with a digest that is still new.

    Raises:
        EvidenceError: the tables do not have the digest that the rank reported.
    """
    known: dict[str, Mapping[str, Any]] = {}
    for replica, answers in enumerate(replicas):
        if all(answer["told"] in known for answer in answers):
            continue
        for rank, (answer, tables) in enumerate(zip(answers, tables_of(replica), strict=True)):
            if table_digest(tables) != answer["told"]:
                raise EvidenceError(f"rank {rank} of replica {replica} reported other tensors when it was asked again")
            known.setdefault(answer["told"], tables)
    return [{**answer, **known[answer["told"]]} for answers in replicas for answer in answers]


def _ways(rollout: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Return for every rank the number of its distinct table, and for every distinct table its first rank."""
    ways: dict[str, int] = {}
    way_of, first_ranks = [], []
    for rank, answer in enumerate(rollout):
        told = answer.get("told") or table_digest(answer)
        if told not in ways:
            ways[told] = len(ways)
            first_ranks.append(rank)
        way_of.append(ways[told])
    return way_of, first_ranks


def _of_ranks(by_way: Mapping[str, Any], way_of: Sequence[int]) -> dict[str, Any]:
    """Expand values of the actor and of every distinct table to values of the actor and of every rank."""
    return {"actor": by_way["actor"]} | {f"rollout {r}": by_way[f"rollout {way}"] for r, way in enumerate(way_of)}


def _sliced(slices: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    parts = [(name, json.dumps(list(part))) for name, part in slices.items()]
    return {"matrices": len(parts), "digest": combined_digest(parts)}


def _fault(digest: str, part: Part) -> str:
    what = f"rows and columns {list(part.slice)} of the tensor" if part.slice else "the tensor"
    return f"it holds {what} with the digest {digest[:12]}… ({part.form})" if len(digest) == 64 else digest
