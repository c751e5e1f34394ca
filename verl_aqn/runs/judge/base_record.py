"""Check of a record of kind `base`: do disk, actor and rollout hold the same frozen tensors? Torch is not needed here.

The trainer checks each record when it writes it, and `report` checks it again. Fields of a record:

- `when`: "start" or "end" of an attempt; `seconds`: how long the comparison took.
- `quantised`: whether the base is packed MXFP4; `form`: the form in which the rollout holds it: "packed", "bf16" with
  the same values, or "int8".
- `int8` (of the form "int8"): how the values in int8 differ from the packed ones, computed from the packed folder:
  {"blocks", "changed", "error", "matrix", "matrix_error"} (`verl_aqn.mxfp4.int8_change`). What the rollout holds is
  compared with exactly these values.
- `ranks`: {"actor": n, "rollout": n}, the number of ranks.
- `expected`: for each group (`GROUPS`) the number of tensors in the folder; a packed module counts as one.
- `holders`: for each of "actor", "rollout 0", … and each group: `tensors`, how many were compared; `elsewhere`, how
  many other ranks hold; `live`, how many were read where the model computes with them (the others were compared as they
  were loaded); and two combined digests: `actual`, of what the process holds, and `disk`, of the same parts of the same
  tensors on disk.
- `converted`: for each holder, how many tensors were rounded to the dtype of the process, by "from → to".
- `not_compared`: list of {"side", "group", "code" (`CODES`), "reason", "tensors", "names"}.
- `left`: for each holder the digest of the tensors in `not_compared` that it holds; it must not change until the end.
- `differ`: list of {"holder", "name", "fault"}; `uncovered`: tensors that the rollout's ranks together do not hold
  completely. Both must be empty.
- `actor_digests`: for each rank of the actor the digest of everything that it holds; all must be equal.
- `files`: what was read from disk, and whether it was read "now" or "at the start" of the attempt.
- `activation`: the expected rounding of activations; `actor_activations` and `rollout[].activations`: the actual one.
- `disk`, `served`, `actor` (of a quantised base): digests of its packed modules on disk, of the form that the rollout
  holds, and of every rank of the actor.
- `rollout`: the reading of every rank (`verl_aqn.integrations.vllm.readback.describe_base`), with `sliced` instead of
  its
  `slices`: the number of matrices that the rank holds in part or not at all (`matrices`), and a digest of the parts.
  Older records have `slices`.

In the file, ranks with equal readings are one entry (`verl_aqn.runs.judge.ranks.grouped_base`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4 import int8_change
from verl_aqn.mxfp4.int8_change import base_fault, matrix_fault
from verl_aqn.runs.judge.ranks import wide_base

GROUPS = {
    "packed": ("packed matrix", "packed matrices"),
    "matrices": ("16-bit matrix", "16-bit matrices"),
    "norms": ("norm", "norms"),
    "embeddings": ("embedding", "embeddings"),
    "head": ("head", "heads"),
    "biases": ("bias", "biases"),
    "routers": ("router", "routers"),
    "other": ("other tensor", "other tensors"),
}
CODES = {
    "tied": tuple(GROUPS),  # the same values as a tensor that is compared
    "other part": tuple(GROUPS),  # the part of a multimodal model for images or sound, which the actor does not have
    "unused": tuple(GROUPS),  # neither the actor nor the rollout holds it
    "computed": ("other", "biases"),  # vLLM computes another tensor from it
    "converted": ("matrices", "other"),  # transformers converts it into another tensor
    "lost": ("matrices", "other"),  # its way into vLLM cannot be followed
}
"""The reasons for which a tensor may be left out of the comparison, each with the groups that it is valid for."""
KERNELS = ("weights_digest", "kernel_digest")  # digests of weights whose kernels store them in their own layout
SHOWN = 8  # how many names of tensors that were not compared are listed for one reason
NEW = (
    "left",
    "expected",
    "holders",
    "not_compared",
    "differ",
    "uncovered",
    "ranks",
    "actor_digests",
    "files",
    "converted",
    "form",
)
AGAIN = "start the run again; if this happens again, report it to the authors with evidence.jsonl"
EMPTY_DIGEST = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"  # the digest of no tensors


def is_old(record: Mapping[str, Any]) -> bool:
    """Return whether an older version, which compared packed modules only, wrote the record."""
    return not any(name in record for name in NEW)


def check_base(record: Mapping[str, Any], first: Mapping[str, Any] | None) -> None:
    """Raise EvidenceError unless ``record`` shows that disk, actor and rollout hold the same base.

    ``first``: the record from the start of the same attempt; it is required for a record from the end.
    """
    try:
        _check(wide_base(record), first and wide_base(first))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise EvidenceError(f"the base's record is damaged ({type(error).__name__}: {error}): {AGAIN}") from error


def _check(record: Mapping[str, Any], first: Mapping[str, Any] | None) -> None:
    when = record.get("when")
    _must(when in ("start", "end"), "the base's record does not say when it was written (when: start or end)")
    where = f"at the {when}: "
    _must(when == "start" or bool(first), f"{where}there is no record of the base from the start to compare with")
    quantised, form, ranks, expected = (
        _get(record, name, where) for name in ("quantised", "form", "ranks", "expected")
    )
    _must(
        isinstance(quantised, bool) and form in ("packed", "bf16", "int8"),
        f"{where}the record does not say whether and how the base is quantised",
    )
    _must(quantised or form == "bf16", f"{where}a base that is not quantised cannot be {form}")
    _must(
        isinstance(ranks, Mapping) and all(_count(ranks.get(side)) for side in ("actor", "rollout")),
        f"{where}the record does not say how many ranks the actor and the rollout have",
    )
    _must(
        isinstance(expected, Mapping)
        and bool(expected)
        and all(g in GROUPS and _count(n) for g, n in expected.items()),
        f"{where}the record does not say what the folder holds",
    )
    _must(
        bool(expected.get("packed")) == quantised,
        f"{where}the number of packed matrices on disk does not fit the field quantised",
    )
    _must(any(expected.get(g) for g in ("packed", "matrices")), f"{where}the folder holds no matrix")
    _check_differences(record, where)
    _check_holders(record, expected, ranks, where)
    _check_packed(record, quantised, form, ranks, where)
    _check_int8(record, form, where)
    _check_activations(record, ranks, where)
    _check_files(record, first, where)
    if when == "end" and first is not None:
        _check_unchanged(record, first)


def sentence(record: Mapping[str, Any]) -> str:
    """Say in one line what was compared, for a record that `check_base` accepts."""
    record = wide_base(record)
    expected, left = record["expected"], record["not_compared"]
    compared = {}
    for group in GROUPS:
        out = {
            side: sum(one["tensors"] for one in left if (one["side"], one["group"]) == (side, group)) for side in SIDES
        }
        if count := expected.get(group, 0) - max(out.values()):
            compared[group] = count
    parts = [_counted(group, count) for group, count in compared.items()]
    text = f"base equal on disk, in the actor and in the rollout: {', '.join(parts)}"
    loaded = [
        g for g in compared if any(not _live(record, group=g, holder=h) for h in record["holders"] if h != "actor")
    ]
    if loaded:
        names = " and ".join(GROUPS[group][1] for group in loaded)
        text += f" ({names} of the rollout as they were loaded, because its kernels store them in another layout)"
    rounded = sum(sum(counts.values()) for counts in record["converted"].values())
    text += f"; {rounded} of them after rounding to the dtype of the process" if rounded else ""
    text += f"; {int8_change.sentence(record['int8'])}" if "int8" in record else ""
    reasons = [
        f"{_counted(one['group'], one['tensors'])} in the {one['side']} ({', '.join(one['names'][:2])}"
        f"{', …' if one['tensors'] > 2 else ''}: {one['reason']})"
        for one in left
    ]
    return text + (f"; not compared: {'; '.join(reasons)}" if reasons else "")


SIDES = ("actor", "rollout")


def _live(record: Mapping[str, Any], holder: str, group: str) -> bool:
    one = record["holders"][holder].get(group)
    return one is None or one["live"] == one["tensors"]


def _counted(group: str, count: int) -> str:
    return f"{count:,} {GROUPS[group][count != 1]}"


def _must(holds: bool, fault: str) -> None:
    if not holds:
        raise EvidenceError(f"{fault}: {AGAIN}")


def _get(record: Mapping[str, Any], name: str, where: str) -> Any:
    value = record.get(name)
    _must(value is not None, f"{where}the base's record lacks {name}")
    return value


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _slice(value: Any) -> bool:
    return isinstance(value, list) and len(value) >= 4 and len(value) % 4 == 0 and all(map(_natural, value))


def holds_parts(answer: Mapping[str, Any]) -> bool:
    """Return whether a rank of the rollout holds only a part of some matrix."""
    return bool(answer["sliced"]["matrices"] if "sliced" in answer else answer["slices"])


def _tells_parts(answer: Mapping[str, Any]) -> bool:
    if "sliced" not in answer:
        return all(_slice(part) for part in answer["slices"].values())
    sliced = answer["sliced"]
    empty = sliced["digest"] == EMPTY_DIGEST
    return _natural(sliced["matrices"]) and _digest(sliced["digest"]) and empty == (sliced["matrices"] == 0)


def _digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _check_differences(record: Mapping[str, Any], where: str) -> None:
    differ, uncovered = record.get("differ"), record.get("uncovered")
    _must(isinstance(differ, list) and isinstance(uncovered, list), f"{where}the record lacks differ or uncovered")
    assert isinstance(differ, list)
    assert isinstance(uncovered, list)
    if differ:
        one = differ[0]
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        raise EvidenceError(
            f"{where}{one.get('name')} in {one.get('holder')} differs from the folder: {one.get('fault')}{more}; "
            "see evidence.jsonl, and quantise the base again if its files were changed"
        )
    if uncovered:
        raise EvidenceError(f"{where}the rollout's ranks together do not hold all of {uncovered[0]}")


def _left_out(record: Mapping[str, Any], expected: Mapping[str, int], where: str) -> dict[tuple[str, str], int]:
    """Return for each (side, group) how many tensors were left out; raise unless each has a valid reason."""
    left = record.get("not_compared")
    _must(isinstance(left, list), f"{where}the record does not say what was not compared")
    assert isinstance(left, list)
    found: dict[tuple[str, str], int] = {}
    for one in left:
        _must(isinstance(one, Mapping), f"{where}not_compared is damaged")
        side, group, code, names = (one.get(key) for key in ("side", "group", "code", "names"))
        fault = f"{where}the tensors that were not compared ({group} of the {side}) have no names or no reason"
        _must(side in SIDES and group in expected and bool(one.get("reason")) and isinstance(one["reason"], str), fault)
        _must(isinstance(names, list) and bool(names) and all(isinstance(n, str) and n for n in names), fault)
        _must(_count(one.get("tensors")), fault)
        assert isinstance(names, list)
        _must(len(names) == min(one["tensors"], SHOWN), fault)
        _must(
            code in CODES and group in CODES[code],
            f"{where}{names[0]} in the {side} was not compared with the folder ({one['reason']})",
        )
        found[(side, group)] = found.get((side, group), 0) + one["tensors"]
    return found


def _check_holders(
    record: Mapping[str, Any], expected: Mapping[str, int], ranks: Mapping[str, int], where: str
) -> None:
    left = _left_out(record, expected, where)
    holders, converted, digests = (_get(record, name, where) for name in ("holders", "converted", "actor_digests"))
    alone = _get(record, "left", where)
    wanted = ["actor", *(f"rollout {rank}" for rank in range(ranks["rollout"]))]
    _must(
        isinstance(holders, Mapping) and sorted(holders) == sorted(wanted),
        f"{where}not every rank reported what it holds",
    )
    _must(
        isinstance(converted, Mapping)
        and sorted(converted) == sorted(wanted)
        and all(isinstance(c, Mapping) and all(_count(n) for n in c.values()) for c in converted.values()),
        f"{where}the record does not say what was rounded",
    )
    _must(
        sorted(alone) == sorted(wanted) and all(map(_digest, alone.values())),
        f"{where}the record has no digests of the tensors that were not compared",
    )
    for name in wanted:
        side = name.split()[0]
        groups = holders[name]
        _must(
            isinstance(groups, Mapping) and sorted(groups) == sorted(expected), f"{where}{name} lacks groups of tensors"
        )
        for group, one in groups.items():
            what = f"{where}the {GROUPS[group][1]} of {name}"
            _must(isinstance(one, Mapping), f"{what} are not on record")
            counts = [one.get(key) for key in ("tensors", "elsewhere", "live")]
            _must(all(_natural(count) for count in counts), f"{what} are not counted")
            tensors, elsewhere, live = counts
            out = left.get((side, group), 0)
            _must(
                tensors + elsewhere + out == expected[group]
                and live <= tensors
                and not (side == "actor" and elsewhere),
                f"{what}: {tensors} compared, {elsewhere} on other ranks and {out} left out, of {expected[group]}",
            )
            _must(
                _digest(one.get("actual")) and one.get("actual") == one.get("disk"), f"{what} differ from the folder's"
            )
            _must(
                (one["actual"] == EMPTY_DIGEST) == (tensors == 0),
                f"{what} have a digest that does not fit their number",
            )
            _must(
                live == tensors or (side == "rollout" and group != "norms"),
                f"{what} were compared as they were loaded, not as they are now",
            )
    for group, count in expected.items():
        compared = any(holders[name][group]["tensors"] for name in wanted[1:])
        _must(compared or left.get(("rollout", group), 0) == count, f"{where}no rank of the rollout holds {group}")
    _must(
        isinstance(digests, list) and len(digests) == ranks["actor"] and all(map(_digest, digests)),
        f"{where}not every rank of the actor reported what it holds",
    )
    _must(len(set(digests)) == 1, f"{where}the ranks of the actor hold different tensors")


def _ranks_of(record: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> list[Mapping[str, Any]]:
    answers = record.get("rollout")
    _must(
        isinstance(answers, list)
        and len(answers) == ranks["rollout"]
        and all(isinstance(one, Mapping) for one in answers),
        f"{where}not every rank of the rollout answered",
    )
    assert isinstance(answers, list)
    return answers


def _check_packed(record: Mapping[str, Any], quantised: bool, form: str, ranks: Mapping[str, int], where: str) -> None:
    """Check the digests of the packed modules, and what their kernels compute with."""
    answers = _ranks_of(record, ranks, where)
    for rank, one in enumerate(answers):
        # None means that the kernel stores the weights in its own layout; then they must not change after the start.
        _must(
            "weights_equal_base" in one and one["weights_equal_base"] in (True, None),
            f"{where}rollout rank {rank} computes with weights that are not those of its base",
        )
        _must(
            all(key in one and (one[key] is None or _digest(one[key])) for key in KERNELS)
            and all(one.get(key) is not None for key in ("layers", "experts", "kernel", "activations")),
            f"{where}rollout rank {rank} does not say what it computes with",
        )
        name = f"rollout {rank}"
        _must(
            one.get("form") == form,
            f"{where}{name} holds its base as {one.get('form')}, expected aqn.mxfp4.rollout_weight_format={form}",
        )
        _must(_tells_parts(one), f"{where}{name} does not say which parts it holds")
    if not quantised:
        alone = all((one.get("base_digest"), one["weights_equal_base"]) == (EMPTY_DIGEST, None) for one in answers)
        _must(alone, f"{where}a 16-bit base has packed matrices")
        return
    disk, served, actor = (_get(record, name, where) for name in ("disk", "served", "actor"))
    _must(
        _digest(disk) and _digest(served) and actor == [disk] * ranks["actor"],
        f"{where}the MXFP4 base of the actor is not the folder's",
    )
    _must((served == disk) == (form == "packed"), f"{where}the form of the rollout's base is not {form}")
    for rank, one in enumerate(answers):
        name = f"rollout {rank}"
        packed = record["holders"][name]["packed"]
        _must(
            packed["live"] == (packed["tensors"] if one["weights_equal_base"] else 0),
            f"{where}the record contradicts itself about what {name} computes with",
        )
        expected = packed["disk"] if holds_parts(one) else served
        _must(
            one.get("base_digest") == expected == packed["actual"],
            f"{where}the MXFP4 base of {name} is not the folder's",
        )
        _must(_count(one["layers"]) or not packed["tensors"], f"{where}{name} has no layer")


def _check_int8(record: Mapping[str, Any], form: str, where: str) -> None:
    """Check that the record says how int8 changes the base, if the rollout holds it in int8, and that it may."""
    _must(("int8" in record) == (form == "int8"), f"{where}the record does not say what int8 changes")
    if form != "int8":
        return
    found = record["int8"]
    blocks, changed, error, most = (found[key] for key in ("blocks", "changed", "error", "matrix_error"))
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in (error, most))
    _must(
        _count(blocks)
        and _natural(changed)
        and numbers
        and isinstance(found["matrix"], str)
        and bool(found["matrix"])
        # No block loses more than all of its values, and the worst matrix is not better than all matrices together.
        and changed <= blocks
        and (changed > 0) == (error > 0) == (most > 0)
        and 0 <= error <= min(most, math.sqrt(changed / blocks)) * (1 + 1e-9)
        and most <= 1 + 1e-9,
        f"{where}the record contradicts itself about what int8 changes",
    )
    if fault := matrix_fault(found["matrix"], most) or base_fault(error):
        raise EvidenceError(f"{where}{fault}")


def _check_activations(record: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> None:
    """Check how both sides round the activations that they multiply packed weights with."""
    expected, actor = _get(record, "activation", where), _get(record, "actor_activations", where)
    _must(
        isinstance(actor, list) and len(actor) == ranks["actor"],
        f"{where}not every rank of the actor reported its rounding",
    )
    if not record["quantised"]:
        rounding = [*actor, *(one.get("activations") for one in record["rollout"])]
        _must(expected == "none" and rounding == [[]] * len(rounding), f"{where}a 16-bit base rounds activations")
        return
    for rank, found in enumerate(actor):
        if found != [expected]:
            raise EvidenceError(
                f"actor rank {rank} rounds activations as {found}, but the recipe asks for {expected!r}"
            )
    for one in record["rollout"]:
        if one.get("activations") != [expected]:
            raise EvidenceError(
                f"the rollout's kernel {one.get('kernel')} rounds activations as {one.get('activations')}, but the "
                f"recipe asks for {expected!r}: set actor_rollout_ref.rollout.engine_kwargs.vllm.linear_backend "
                "(marlin for W4A16), or aqn.mxfp4.activation"
            )


def _check_files(record: Mapping[str, Any], first: Mapping[str, Any] | None, where: str) -> None:
    files = _get(record, "files", where)
    fault = f"{where}the record does not say what was read from disk"
    _must(isinstance(files, Mapping) and all(_count(files.get(key)) for key in ("files", "bytes")), fault)
    _must(_natural(files.get("tensors")) and files.get("read") in ("now", "at the start"), fault)
    _must((files["tensors"] > 0) == (files["read"] == "now"), fault)
    if files["read"] == "at the start":
        _must(record["when"] == "end" and first is not None, f"{where}nothing was read from disk")
    seconds = record.get("seconds")
    _must(isinstance(seconds, int | float) and seconds >= 0, f"{where}the record does not say how long it took")
    if record["when"] == "start":
        _must(files["tensors"] >= max(record["expected"].values()) > 0, f"{where}less was read than the folder holds")


def _check_unchanged(record: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Check that everything at the end is what it was at the start."""
    _must(first.get("when") == "start", "the record that the end is compared with is not from a start")
    for name in (
        "quantised",
        "form",
        "ranks",
        "expected",
        "not_compared",
        "converted",
        "activation",
        "actor_digests",
        "left",
        "int8",
    ):
        _must(record.get(name) == first.get(name), f"at the end {name} of the base differs from the start")
    for key in ("files", "bytes"):
        _must(record["files"][key] == first["files"].get(key), f"at the end the folder's {key} differ from the start")
    if record["quantised"]:
        _must(record["disk"] == first.get("disk"), "at the end the MXFP4 base on disk differs from the start")
        _must(
            record["served"] == first.get("served"), "at the end the form of the rollout's base differs from the start"
        )
    for name, groups in _pairs(record["holders"], first.get("holders")):
        for group, one, before in groups:
            _must(one == before, f"at the end the {GROUPS[group][1]} of {name} differ from the start")
    for rank, one in enumerate(record["rollout"]):
        before = ((first.get("rollout") or [])[rank:][:1] or [{}])[0]
        for key in (*KERNELS, "layers", "experts", "kernel", "activations", "slices", "sliced", "weights_equal_base"):
            _must(
                one.get(key, ...) == before.get(key, ...),
                f"at the end the weights that rollout rank {rank} computes with ({key}) differ from the start",
            )


def _pairs(now: Mapping[str, Any], before: Any) -> Iterator[tuple[str, list[tuple[str, Any, Any]]]]:
    before = before if isinstance(before, Mapping) else {}
    for name, groups in now.items():
        yield name, [(g, one, (before.get(name) or {}).get(g)) for g, one in groups.items()]
