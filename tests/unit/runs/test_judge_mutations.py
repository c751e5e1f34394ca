"""The judge of records: every change of a field, and every lost, swapped or repeated record is reported as a fault."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.nested import paths
from tests.helpers.real_records import FORMS, REAL, lines_of, records_of
from verl_aqn.runs.chain import LINK, broken
from verl_aqn.runs.evidence import expected_of, judge_lines
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.judge.records import IDENTITY

# Descriptive fields: no other record determines their value. Only the chain of records protects them.
DESCRIBED = {
    "placed": {"actor_nodes[0]", "rollout_nodes[0]"},
    "layout": {"layout"},
    "rollout": {"vllm", "dtype", "linears", "multipliers", "multipliers[0]"},
    "base": {
        "seconds",
        "files.tensors",
        *(f"{ranks}[0].{field}" for ranks in ("rollout", "rollout_ranks") for field in ("kernel", "layers", "experts")),
    },
    "noise": {"weights_digest"},
    "adapter": {"actual[0].b_max"},
    "actor clean": {"uses"},
    "mismatch": {"abs_dlogp_error"},
    "use": {"predicted", "predicted_by", "here", "error"},
}


def name_of(path: tuple) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def mutations(record: dict) -> Iterator[tuple[str, str, dict]]:
    """Yield (description of the change, field, changed record)."""
    for path in paths({key: value for key, value in record.items() if key != LINK}):
        inner = record
        for key in path[:-1]:
            inner = inner[key]
        value = inner[path[-1]]
        changes: list[tuple[str, Any]] = [("null", None)]
        if isinstance(value, bool):
            changes.append(("flipped", not value))
        elif isinstance(value, int | float):
            changes += [("scaled", value * 20 + 1), ("negated", -value - 1)]
        elif isinstance(value, str):
            changes.append(("another", "0" * len(value) + "x"))
        elif isinstance(value, list | dict) and value:
            changes.append(("emptied", type(value)()))
        for what, new in changes:
            if new == value:
                continue
            changed = copy.deepcopy(record)
            target = changed
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = new
            yield what, name_of(path), changed
        changed = copy.deepcopy(record)
        target = changed
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]
        yield "deleted", name_of(path), changed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", REAL, ids=lambda run: run.name)
def test_a_changed_field_is_found_without_the_chain(run, form):
    """Fields outside `DESCRIBED` are checked by their values, not by the chain."""
    records, passed = records_of(run, form), []
    lines = lines_of(records)
    expected = expected_of(RunFolder(run), lines)
    for at, record in enumerate(records):
        if record["kind"] not in IDENTITY:
            continue
        before = lines[at - 1] if at else b""
        for what, field, changed in mutations(record):
            if what != "deleted" and field in DESCRIBED.get(record["kind"], ()):
                continue
            if not judge_lines(expected, lines[:at] + lines_of([changed, *records[at + 1 :]], before=before)).faults:
                passed.append(f"{record['kind']}: {field} {what}")
    assert sorted(set(passed)) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", REAL, ids=lambda run: run.name)
def test_any_changed_field_is_found(run, form):
    records = records_of(run, form)
    lines = lines_of(records, link=False)
    assert broken(lines) == (len(lines), [])
    for at, record in enumerate(records):
        for what, field, changed in mutations(record):
            _, breaks = broken([*lines[:at], *lines_of([changed], link=False), *lines[at + 1 :]])
            assert breaks, f"{record['kind']}: {field} {what}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", REAL, ids=lambda run: run.name)
def test_lost_swapped_and_repeated_records_are_found_without_the_chain(run, form):
    records = records_of(run, form)
    expected = expected_of(RunFolder(run), lines_of(records))

    def faults(changed: list[dict]) -> list[str]:
        return judge_lines(expected, lines_of(changed)).faults

    for at, record in enumerate(records):
        if record["kind"] not in IDENTITY:
            continue
        told = f"{record['kind']} {at}"
        assert faults(records[:at] + records[at + 1 :]), told
        assert faults([*records[: at + 1], *records[at:]]), told
        for other in range(at + 1, len(records)):
            if records[other]["kind"] == record["kind"] and "step" in record:
                swapped = copy.deepcopy(records)
                one, two = swapped[at], swapped[other]
                one["step"], two["step"] = two["step"], one["step"]
                if one["step"] != two["step"]:
                    assert faults(swapped), f"{told} and {other}"
