"""The judge of the base's records: any deleted, emptied, null or changed field is detected."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.base_answers import actor_of, loaded, record_of, records, rollout_of
from tests.helpers.family_models import make
from tests.helpers.nested import paths
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.errors import EvidenceError
from verl_aqn.runs.judge.base_record import check_base, is_old, sentence
from verl_aqn.runs.judge.ranks import grouped_base, wide_base

# Fields that do not show equality at the start. They must exist, and must be the same at the end.
FREE = {
    "bytes",
    "kernel",
    "layers",
    "experts",
    "files",
    "reason",
    "names",
    "weights_digest",
    "kernel_digest",
    "sliced",
    "digest",
    "seconds",
    "converted",
    "actor_digests",
    "left",
    "blocks",
    "changed",
    "matrix",
}
NULLABLE = {"weights_digest", "kernel_digest", "weights_equal_base"}


@pytest.fixture(
    scope="module", params=["packed", "source", "parts", "written", "written in parts", "int8", "int8 parts"]
)
def pair(request, tmp_path_factory) -> tuple[dict, dict]:
    """The records of start and end of an attempt: packed, not quantised, and on two ranks with halves.

    Two more are in the written form: of three ranks, two hold the same. In the last two, the rollout holds int8.
    """
    root = tmp_path_factory.mktemp("judge")
    form = "int8" if request.param.startswith("int8") else "packed"
    make("glm4" if request.param != "source" else "gemma3_vl", root / "source")
    if form == "int8":
        round_one_block(root / "source" / "model.safetensors")
    quantize_checkpoint(root / "source", root / "packed")
    folder = root / ("packed" if request.param != "source" else "source")
    halves: list = [None]
    if request.param.endswith("parts"):
        halves = [{"model.layers.0.self_attn.q_proj": [32 * rank, 32, 0, 64]} for rank in range(2)]
    if request.param.startswith("written"):
        halves = [*halves, halves[0]] if len(halves) > 1 else halves * 3
    actor, made = [actor_of(loaded(folder), folder)] * len(halves), records(folder, form)
    rollout = [rollout_of(folder, slices, form) for slices in halves]
    found = [record_of(folder, actor, rollout, when, made) for when in ("start", "end")]
    if request.param.startswith("written"):
        found = [grouped_base(record) for record in found]
    return tuple(json.loads(json.dumps(record)) for record in found)


def round_one_block(file: Path) -> None:
    """Make a block of weights so small that int8 rounds it."""
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.o_proj.weight"][3, :32] *= 2.0**-4
    save_file(tensors, file, {"format": "pt"})


def other(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool) or value is None:
        return value is None or not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value[:-1]}{'0' if value[-1:] != '0' else '1'}"
    return (
        {}
        if isinstance(value, dict) and value
        else []
        if value
        else ["more"]
        if isinstance(value, list)
        else {"more": 1}
    )


def changed(record: dict, path: tuple, how: str) -> dict | None:
    """Return the record with one change, None if that would change nothing."""
    record = copy.deepcopy(record)
    at: Any = record
    for key in path[:-1]:
        at = at[key]
    before = at[path[-1]]
    if how == "deleted":
        del at[path[-1]]
    else:
        at[path[-1]] = None if how == "null" else other(before)
        if at[path[-1]] == before and type(before) is type(at[path[-1]]):
            return None
    return record


@pytest.mark.parametrize("how", ["deleted", "null", "changed"])
def test_every_field_counts(pair, how):
    start, end = pair
    check_base(start, None)
    check_base(end, start)
    unnoticed = []
    parts = start["form"] == "int8" and len(start["rollout"]) > 1
    free = FREE | {"served"} if parts else FREE  # no rank holds the whole
    for record, first in ((start, None), (end, start)):
        for path in paths(record):
            if how == "changed" and (path == ("seconds",) or (first is None and free & set(path))):
                continue
            if how == "null" and first is None and (path[-1] in NULLABLE):
                continue
            one = changed(record, path, how)
            if one is None:
                continue
            try:
                check_base(one, first)
            except EvidenceError:
                continue
            else:
                unnoticed.append((record["when"], *path))
    assert not unnoticed, unnoticed[:20]


def test_two_holders_may_not_be_swapped_nor_doubled(pair):
    start, end = map(wide_base, pair)
    if start["ranks"]["rollout"] == 2:
        swapped = copy.deepcopy(start)
        swapped["rollout"].reverse()
        with pytest.raises(EvidenceError, match="rollout 0"):
            check_base(swapped, None)
    doubled = copy.deepcopy(start)
    doubled["rollout"].append(doubled["rollout"][0])
    with pytest.raises(EvidenceError, match="not every rank of the rollout answered"):
        check_base(doubled, None)
    with pytest.raises(EvidenceError):
        check_base({}, None)
    with pytest.raises(EvidenceError):
        check_base({"when": "start"}, None)
    with pytest.raises(EvidenceError):
        check_base(end, {})
    with pytest.raises(EvidenceError):
        check_base(end, end)


def test_ranks_are_there_once_and_all_of_them(pair):
    start, end = pair
    if "rollout_ranks" not in start:
        return
    assert wide_base(json.loads(json.dumps(grouped_base(wide_base(start))))) == wide_base(start)
    for side in ("actor_ranks", "rollout_ranks"):
        for ranks in ([0, 1], [0, 1, 1], [0, 1, 2, 3], [1, 2, 3], [0, 1, -2], [], [True, 0, 2], ["0", 1, 2]):
            record = copy.deepcopy(start)
            record[side] = [record[side][0] | {"ranks": ranks}]
            with pytest.raises(EvidenceError):
                check_base(record, None)
        for change in (list.pop, lambda groups: groups.append(groups[0]), list.clear):
            record = copy.deepcopy(start)
            change(record[side])
            with pytest.raises(EvidenceError):
                check_base(record, None)
    record = copy.deepcopy(end)  # as many as there are, but each another one
    for group in record["rollout_ranks"]:
        group["ranks"] = [2 - rank for rank in group["ranks"]]
    if len(record["rollout_ranks"]) > 1:
        record["rollout_ranks"][0]["ranks"], record["rollout_ranks"][1]["ranks"] = [1, 2], [0]
        with pytest.raises(EvidenceError, match="at the end"):
            check_base(record, start)


INT8 = {"blocks": 10_000, "changed": 4, "error": 0.004, "matrix": "o_proj", "matrix_error": 0.015}


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, None),
        ({"changed": 0, "error": 0.0, "matrix_error": 0.0}, None),
        ({"matrix_error": 0.021}, r"o_proj would change by 2\.1 % in int8, more than 2 %.*=bf16"),
        ({"changed": 400, "error": 0.0051}, r"the base would change by 0\.51 % in int8, more than 0\.5 %.*=bf16"),
        ({"changed": 0}, "contradicts itself"),  # an error of no block
        ({"error": 0.0}, "contradicts itself"),
        ({"matrix_error": 0.0}, "contradicts itself"),
        ({"matrix_error": 0.003}, "contradicts itself"),  # the worst is better than all together
        ({"blocks": 10**6}, "contradicts itself"),  # four blocks cannot lose so much
        ({"changed": 10_001}, "contradicts itself"),
        ({"changed": -1}, "contradicts itself"),
        ({"blocks": 0}, "contradicts itself"),
        ({"blocks": True}, "contradicts itself"),
        ({"error": float("nan")}, "contradicts itself"),
        ({"error": -0.004}, "contradicts itself"),
        ({"matrix_error": float("inf")}, "contradicts itself"),
        ({"error": "0.004"}, "contradicts itself"),
        ({"matrix": ""}, "contradicts itself"),
    ],
)
def test_what_int8_changes_is_on_record_and_within_its_limits(pair, fields, fault):
    start = copy.deepcopy(wide_base(pair[0]))
    if start["form"] != "int8":
        start["int8"] = INT8
        with pytest.raises(EvidenceError, match="does not say what int8 changes"):
            check_base(start, None)
        return
    assert start["int8"]["changed"] == 1
    start["int8"] = INT8 | fields
    if fault is None:
        check_base(start, None)
        assert ("4 of 10,000 blocks" in sentence(start)) is ("changed" not in fields)
        return
    with pytest.raises(EvidenceError, match=fault):
        check_base(start, None)


def test_a_tensor_may_be_left_out_for_few_reasons_only(pair):
    start = wide_base(pair[0])
    left = {"side": "rollout", "group": "norms", "reason": "who knows", "tensors": 1, "names": ["model.norm.weight"]}
    for code in ("lost", "computed", "converted", "missing", "other", "", None):
        record = copy.deepcopy(start)
        record["not_compared"].append(left | {"code": code})
        for holder, groups in record["holders"].items():
            if holder != "actor":
                groups["norms"] |= {"tensors": groups["norms"]["tensors"] - 1, "live": groups["norms"]["live"] - 1}
        with pytest.raises(EvidenceError, match="norm"):
            check_base(record, None)


def test_norms_that_were_only_loaded_are_not_enough(pair):
    start = wide_base(pair[0])
    record = copy.deepcopy(start)
    record["holders"]["rollout 0"]["norms"]["live"] = 0
    with pytest.raises(EvidenceError, match="norms of rollout 0 were compared as they were loaded"):
        check_base(record, None)
    record = copy.deepcopy(start)
    record["holders"]["rollout 0"]["embeddings"]["live"] = 0
    check_base(record, None)
    assert "embeddings" in sentence(record).partition("of the rollout as they were loaded")[0]


def test_activations_are_rounded_as_the_recipe_asks(pair):
    start = wide_base(pair[0])
    if not start["quantised"]:
        return
    for expected, actor, rollout, fault in (
        ("none", "none", "rceil/nearest", r"kernel Kernel rounds activations.*linear_backend"),
        ("none", "even/nearest", "none", "actor rank 0 rounds"),
        ("even/nearest", "none", "none", "actor rank 0 rounds"),
        ("even/nearest", "even/nearest", "even/nearest", None),
        ("mxfp8/floor/nearest", "mxfp8/floor/nearest", "floor/nearest", r"kernel Kernel rounds activations"),
        ("mxfp8/floor/nearest", "none", "mxfp8/floor/nearest", "actor rank 0 rounds"),
        ("mxfp8/floor/nearest", "mxfp8/floor/nearest", "mxfp8/floor/nearest", None),
    ):
        actors = [[actor]] * start["ranks"]["actor"]
        record = copy.deepcopy(start) | {"activation": expected, "actor_activations": actors}
        for one in record["rollout"]:
            one["activations"] = [rollout]
        if fault is None:
            check_base(record, None)
            continue
        with pytest.raises(EvidenceError, match=fault):
            check_base(record, None)


def test_old_records_are_known_by_what_they_lack(pair):
    start = wide_base(pair[0])
    old = {"kind": "base", "when": "start", "disk": "a" * 64, "actor": ["a" * 64], "rollout": []}
    assert is_old(old)
    assert is_old({"kind": "base", "when": "start", "quantised": False})
    for name in start:
        assert not is_old({key: value for key, value in start.items() if key != name})


def test_the_judge_needs_no_torch():
    code = "import sys, verl_aqn.runs.judge.base_record; assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
