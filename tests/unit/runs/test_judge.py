"""The judge of records: any change to the records of a real run is reported as a fault."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.json
import pytest

from tests.helpers.real_records import FORMS, REAL, lines_of, records_of
from verl_aqn.errors import EvidenceError
from verl_aqn.noise.spec import NoiseSpec
from verl_aqn.runs.chain import LINK
from verl_aqn.runs.evidence import CHAIN, check_proved, judge_run
from verl_aqn.runs.folder import EVIDENCE, RunFolder
from verl_aqn.runs.judge.records import IDENTITY, VERSION, Judge
from verl_aqn.runs.report.evidence_section import checks
from verl_aqn.runs.report.page_data import read_runs
from verl_aqn.runs.stats.arms import read_run


@pytest.fixture
def folder(tmp_path):
    """`folder(run, records)` → that run with other evidence, linked again so that the chain finds nothing."""

    def make(run: Path, records: list[dict], link: bool = True) -> RunFolder:
        copied = tmp_path / "run"
        if not copied.exists():
            shutil.copytree(run, copied)
        (copied / EVIDENCE).write_bytes(b"".join(line + b"\n" for line in lines_of(records, link)))
        return RunFolder(copied)

    return make


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", REAL, ids=lambda run: run.name)
def test_the_records_of_a_real_run_hold(run, form, folder):
    judgement = judge_run(folder(run, records_of(run, form)))
    assert judgement.version == VERSION
    assert judgement.faults == []
    assert all(finding.good for finding in judgement.findings.values())
    assert judgement.findings[CHAIN].right == len(records_of(run))
    assert {row[1].good for row in checks(read_runs([run])).rows} == {True}
    assert judge_run(RunFolder(run)).faults == []


@pytest.mark.parametrize("run", REAL, ids=lambda run: run.name)
def test_records_of_all_kinds_are_one_table(run, tmp_path):
    """A field has one type in all records, as pyarrow and pandas require."""
    assert pyarrow.json.read_json(run / EVIDENCE).num_rows == len(records_of(run))
    (tmp_path / EVIDENCE).write_bytes(b"".join(line + b"\n" for line in lines_of(records_of(run, FORMS[1]))))
    assert pyarrow.json.read_json(tmp_path / EVIDENCE).num_rows == len(records_of(run))


def test_all_records_of_a_kind_may_not_vanish(folder):
    records = records_of(REAL[0])
    for kind in {record["kind"] for record in records} & set(IDENTITY):
        run = folder(REAL[0], [record for record in records if record["kind"] != kind])
        rows = checks(read_runs([run.path])).rows
        assert False in [row[1].good for row in rows], kind
    empty = folder(REAL[0], [])
    assert False in [row[1].good for row in checks(read_runs([empty.path])).rows]


@pytest.mark.parametrize(
    ("kind", "change", "row"),
    [
        ("noise", {"sigma_measured": 1.0}, "noise in the rollout's weights"),
        ("noise", {"sigma_target": 7.0}, "noise in the rollout's weights"),
        ("base", {"actor": [], "rollout": []}, "base on disk, in actor and rollout"),
        ("use", {"effect": 0.0, "error": 0.0}, "noise in the rollout's forward pass"),
        ("mismatch", {"abs_dlogp_mean": 1.5}, "trainer and rollout without noise"),
    ],
)
def test_the_row_of_what_is_wrong_says_so(kind, change, row, folder):
    records = records_of(REAL[0])
    at = max(n for n, one in enumerate(records) if one["kind"] == kind and one.get("sigma_target", 1) and
             one.get("sigma", 1) and one.get("step") != 2)  # fmt: skip
    if kind == "use":
        at = next(n for n, one in enumerate(records) if one["kind"] == "use" and one["sigma"] == 0.05)
    run = folder(REAL[0], [*records[:at], records[at] | change, *records[at + 1 :]])
    cells = {one[0].text: one[1] for one in checks(read_runs([run.path])).rows}
    assert cells[row].good is False


@pytest.mark.parametrize(
    ("changes", "row", "text"),
    [
        (
            {"mismatch": {"source": None, "reason": "temperature 0.9"}, "use": {"floor": 0.0}},
            "trainer and rollout without noise",
            "not compared in 3 steps: temperature 0.9",
        ),
        (
            {"use": {"predicted": 0.0, "predicted_by": "", "here": False}},
            "noise in the rollout's forward pass",
            "in none of 3 steps was the noise large enough to be detected in log-probs",
        ),
    ],
)
def test_records_that_show_nothing_are_no_check_that_passed(changes, row, text, folder):
    run = folder(REAL[0], [one | changes.get(one["kind"], {}) for one in records_of(REAL[0])])
    cells = {one[0].text: one[1] for one in checks(read_runs([run.path])).rows}
    assert (cells[row].text, cells[row].good) == (text, None)


def test_another_sigma_than_the_schedule_s_is_found_whatever_the_order_says(folder):
    records = records_of(REAL[0])
    for record in records:
        if record["kind"] == "noise" and record["sigma_target"]:
            scale = 7.0 / record["sigma_target"]
            record["order"]["sigma"] = record["sigma_target"] = 7.0
            record["sigma_measured"] *= scale
            record["sigma_interval"] = [end * scale for end in record["sigma_interval"]]
            for group in record["groups"]:
                group["sigma_measured"] *= scale
    assert any("σ" in fault for fault in judge_run(folder(REAL[0], records)).faults)


def test_the_same_noise_in_two_steps_is_found(folder):
    records = records_of(REAL[1])
    one, two = (record for record in records if record["kind"] == "noise" and record["sigma_target"])
    two["weights_digest"] = one["weights_digest"]
    (fault,) = judge_run(folder(REAL[1], records)).faults
    assert fault == "step 2 has the noise of step 1: no new noise was drawn"


def test_a_run_that_was_stopped_by_its_evidence_shows_it(folder):
    records = [*records_of(REAL[0]), {"kind": "stopped", "reason": "norms are not bit for bit clean"}]
    run = folder(REAL[0], records)
    rows = {row[0].text: row[1] for row in checks(read_runs([run.path])).rows}
    assert rows["stopped because of its own evidence"].good is False
    assert "norms are not bit for bit clean" in rows["stopped because of its own evidence"].text


def test_a_run_that_an_older_version_began_and_a_newer_one_went_on_with_is_judged_as_an_old_one(folder):
    records = records_of(REAL[0])
    new = ("when", "at", "evidence", "rank_count", "whole", LINK)
    old = [{key: value for key, value in one.items() if key not in new}
           for one in records if one["kind"] in ("placed", "layout", "adapter", "noise")]  # fmt: skip
    run = folder(REAL[0], [*old[:4], *records])
    events = run.path / "events.jsonl"
    events.write_text('{"kind": "attempt"}\n' + events.read_text())
    judgement = judge_run(run)
    assert (judgement.version, judgement.faults) == (1, [])
    events.write_text(events.read_text().partition("\n")[2])
    assert judge_run(run).faults  # a run of today with such records


def test_noise_on_linear_layers_makes_clean_readings_larger():
    order = NoiseSpec(0, 0, 0.0, "rms", targets=("norm", "linear"))
    for targets, wrong in ((("norm", "linear"), False), (("norm",), True)):
        judge = Judge(lambda step, targets=targets: replace(order, step=step, targets=targets))
        records = [
            one for one in records_of(REAL[1]) if one["kind"] in ("placed", "layout", "rollout", "base", "adapter")
        ]
        for record in records[:5]:
            assert judge.add(record) is None
        clean = next(one for one in records_of(REAL[1]) if one["kind"] == "clean")
        assert judge.add(clean) is None
        fault = judge.add(clean | {"at": 9, "modules": clean["modules"] + 3, "elements": clean["elements"] + 300})
        assert bool(fault) == wrong, fault


def test_runs_whose_evidence_does_not_hold_are_neither_compared_nor_exported(folder):
    run = folder(REAL[0], records_of(REAL[0])[:-1])
    with pytest.raises(EvidenceError, match=r"has a fault: no record of base for when end"):
        read_run(run.path)
    with pytest.raises(EvidenceError, match="has a fault"):
        check_proved(run)  # as export does first


def test_a_resumed_run_may_take_steps_again(folder):
    """Attempts begin with a record of where they run; within one attempt nothing may occur twice."""
    records = records_of(REAL[0])
    start = [one for one in records if one["kind"] in ("placed", "layout", "rollout")]
    start += [one for one in records if (one["kind"], one.get("when")) == ("base", "start")]
    start += [one for one in records if (one["kind"], one.get("step")) == ("adapter", 2)]
    again = next(n for n, one in enumerate(records) if (one["kind"], one.get("step")) == ("noise", 2))
    assert judge_run(folder(REAL[0], [*records[: again + 1], *start, *records[again:]])).faults == []
    assert judge_run(folder(REAL[0], [*records[: again + 1], *start[1:], *records[again:]])).faults
    # Trainer and rollout may agree about an adapter that is not the one of the checkpoint.
    fresh = json.loads(json.dumps(start).replace(start[-1]["sent"], "f" * 64))
    (fault,) = judge_run(folder(REAL[0], [*records[: again + 1], *fresh, *records[again:]])).faults
    assert fault.startswith("the run was resumed from step 2 with another adapter than it had after that step")
