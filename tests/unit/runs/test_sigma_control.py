"""The judge of closed-loop σ: a run whose σ does not follow its own rule is ✗, whatever its other records say."""

import copy
import json
import math
import shutil

import pytest

from tests.helpers.pages import page_of
from tests.helpers.real_records import REAL, lines_of, records_of
from verl_aqn.errors import EvidenceError
from verl_aqn.launch.console import sigma_table
from verl_aqn.noise.control import METRICS
from verl_aqn.runs.evidence import check_proved, judge_run
from verl_aqn.runs.folder import EVIDENCE, RunFolder
from verl_aqn.runs.report.evidence_section import checks
from verl_aqn.runs.report.page_data import read_runs

(RUN,) = (run for run in REAL if run.name == "sigma_control")
ROW = "σ by its controller, decided again from the records"
START = ("placed", "layout", "rollout", "base")


@pytest.fixture
def folder(tmp_path):
    """`folder(records, metrics=…)` → the run with other records, linked again so that the chain finds nothing."""

    def make(records: list[dict], metrics: dict[int, dict] | None = None) -> RunFolder:
        shutil.copytree(RUN, copied := tmp_path / "run", dirs_exist_ok=True)
        (copied / EVIDENCE).write_bytes(b"".join(line + b"\n" for line in lines_of(records)))
        lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == "step":
                line["metrics"] |= (metrics or {}).get(line["step"], {})
        (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return RunFolder(copied)

    return make


def with_sigma(record: dict, sigma: float) -> dict:
    """A record of noise with another σ everywhere, so that it agrees with itself."""
    scale, record = sigma / record["sigma_target"], copy.deepcopy(record)
    record["order"]["sigma"] = record["sigma_target"] = sigma
    record["sigma_interval"] = [end * scale for end in record["sigma_interval"]]
    for one in (record, *record["groups"]):
        one["sigma_measured"] *= scale
        one["sigma_rounding"] *= scale
    return record


def killed_in_a_repeated_step(more: float, until: str = "use") -> list[dict]:
    """Records of a run that was killed after step 4 and again while it repeated step 4, with other figures."""
    records = records_of(RUN)
    first = [record for record in records if record.get("when") != "end"]
    begin = [record for record in first if record["kind"] in START]
    begin += [record for record in first if record["kind"] == "adapter" and record["step"] == 3]
    at = next(n for n, record in enumerate(first) if record["kind"] == "noise" and record["step"] == 3)
    again = copy.deepcopy(first[at:])
    kinds = [record["kind"] for record in again]
    again = again[: kinds.index(until) + 1]
    for record in again:
        if record["kind"] == "mismatch":
            record["abs_dlogp_mean"] *= more
        if record["kind"] == "use":
            record["floor"] *= more
    return [*first, *begin, *again]


def test_a_run_that_was_killed_while_it_repeated_a_step_is_not_accused(folder):
    """The metrics of the step are those of the attempt before, because a step writes its metrics at its end."""
    assert judge_run(folder(killed_in_a_repeated_step(1.0)), finished=False).faults == []
    run = folder(killed_in_a_repeated_step(1.001))
    assert judge_run(run, finished=False).faults == []
    later = {"kind": "placed", **{key: value for key, value in records_of(RUN)[0].items() if key != "kind"}}
    third = [*killed_in_a_repeated_step(1.001), *(r for r in records_of(RUN) if r["kind"] in ("layout", "rollout"))]
    third.insert(-2, later)
    assert judge_run(folder(third), finished=False).faults == [], "killed a third time, before any step"
    wrong = {4: {"aqn/mismatch/kernels/abs_dlogp_mean": 0.5}}
    (fault,) = judge_run(folder(killed_in_a_repeated_step(1.001), wrong), finished=False).faults
    assert fault.startswith("step 4: abs_dlogp_mean is "), "metrics of neither attempt"
    (fault,) = judge_run(folder(records_of(RUN), wrong)).faults
    assert fault.startswith("step 4: abs_dlogp_mean is ")


def test_a_repeated_step_with_its_own_metrics_is_compared_with_these(folder):
    ended = [record for record in records_of(RUN) if record.get("when") == "end"]
    again = [*killed_in_a_repeated_step(1.001, until="control"), *ended]
    faults = judge_run(folder(again), finished=True).faults
    assert any(fault.startswith("step 4: abs_dlogp_mean is ") for fault in faults)


def test_a_repeated_step_counts_once(folder):
    (run,) = read_runs([folder(killed_in_a_repeated_step(1.0, until="control")).path])
    assert [record["step"] for record in run.of_kind["control"]] == [1, 2, 3, 4]
    row = next(row for row in checks([run]).rows if row[0].text == ROW)
    assert row[1].text.startswith("kl measured in 4 of 4 steps; σ moved in 3")


def test_each_sigma_is_that_of_the_formula():
    """In plain numbers: σ · (target / measured)^0.25 with the target of the next step."""
    control = [record for record in records_of(RUN) if record["kind"] == "control"]
    noise = [record for record in records_of(RUN) if record["kind"] == "noise"]
    sigma = 0.05
    for at, record in enumerate(control):
        assert record["sigma"] == noise[at]["sigma_target"] == pytest.approx(sigma, rel=1e-5)
        sigma *= (0.1 * 0.01 ** ((at + 1) / 28) / record["measured"]) ** 0.25
    assert len({record["sigma"] for record in control}) == 4


def test_another_sigma_than_the_rule_s_is_found_although_all_records_agree_about_it(folder):
    records = records_of(RUN)
    for at, record in enumerate(records):
        if record["kind"] == "noise" and record["step"] == 2:
            records[at] = with_sigma(record, 0.05)
        elif record["kind"] in ("use", "control") and record["step"] == 3:
            record["sigma"] = 0.05
    run = folder(records, {3: {"aqn/sigma": 0.05}})
    faults = judge_run(run).faults
    assert any("expected noise of σ 0.0398052, but the worker's target is σ 0.05" in one for one in faults)
    assert "step 3: sigma of the controller is 0.05, but aqn.noise.control and the measurements before it give " \
           "0.0398052" in faults  # fmt: skip
    cells = {row[0].text: row[1].good for row in checks(read_runs([run.path])).rows}
    assert cells[ROW] is False
    assert cells["noise in the rollout's weights"] is False
    with pytest.raises(EvidenceError, match=r"the evidence of .* has a fault"):
        check_proved(run)


def test_an_open_loop_sigma_in_a_run_that_asks_for_a_closed_one_is_found(folder):
    """A controller that never moves: σ_start in each step."""
    records = [with_sigma(one, 0.05) if one["kind"] == "noise" else one for one in records_of(RUN)]
    assert len([one for one in judge_run(folder(records)).faults if "expected noise of σ" in one]) == 3


def test_another_measurement_is_found_in_evidence_in_metrics_and_in_both(folder):
    records = records_of(RUN)
    (record,) = (one for one in records if one["kind"] == "control" and one["step"] == 2)
    was, name = record["measured"], METRICS["kl"]
    record["measured"] = 0.5
    both = judge_run(folder(records, {2: {name: 0.5}})).faults
    assert any(one.startswith("step 3: sigma of the controller is 0.0398052, but") for one in both)
    assert any("step 2: measured is 0.5 in evidence.jsonl" in one for one in judge_run(folder(records)).faults)
    record["measured"] = was
    assert any("measured is" in one for one in judge_run(folder(records, {2: {name: 0.5}})).faults)
    assert any("measured is" in one for one in judge_run(folder(records, {2: {name: None}})).faults)
    assert judge_run(folder(records)).faults == []


def test_a_step_without_a_measurement_holds_sigma_and_must_say_why(folder):
    records = records_of(RUN)
    (record,) = (one for one in records if one["kind"] == "control" and one["step"] == 4)
    record |= {"measured": None, "reason": f"{METRICS['kl']} is nan"}
    held = {4: {METRICS["kl"]: None}}
    assert judge_run(folder(records, held)).faults == []
    record["reason"] = ""
    assert "step 4: the controller has no measurement and no reason, or both" in judge_run(folder(records, held)).faults
    record |= {"measured": 0.03, "reason": "none"}
    assert "step 4: the controller has no measurement and no reason, or both" in judge_run(folder(records, held)).faults
    (record,) = (one for one in records if one["kind"] == "control" and one["step"] == 2)
    record |= {"measured": None, "reason": "none was scored again"}
    faults = judge_run(folder(records, {2: {METRICS["kl"]: None}})).faults
    assert any("sigma of the controller is 0.0398052, but" in one and "give 0.0471293" in one for one in faults)


def resumed(records: list[dict], saved: int, abandoned: float) -> list[dict]:
    """Records of a run that measured `abandoned` in the step after its last checkpoint, died, and resumed."""
    at = next(n for n, one in enumerate(records) if one["kind"] == "control" and one["step"] == saved)
    last = next(n for n, one in enumerate(records) if one["kind"] == "control" and one["step"] == saved + 1)
    first = [*records[:last], records[last] | {"measured": abandoned}]
    start = [one for one in records[:6] if one["kind"] in START]
    (synced,) = (one for one in records if one["kind"] == "adapter" and one["step"] == saved)
    return copy.deepcopy([*first, *start, synced, *records[at + 1 :]])


def test_a_resumed_run_decides_by_the_records_up_to_its_checkpoint(folder):
    records = records_of(RUN)
    assert judge_run(folder(resumed(records, 2, 0.9))).faults == []
    # It had another σ in the step after it, if it had used what was abandoned.
    wrong = resumed(records, 2, 0.9)
    sigma = 0.0398052 * math.exp(0.25 * math.log(0.061054 / 0.9))
    at = max(n for n, one in enumerate(wrong) if one["kind"] == "noise" and one["step"] == 3)
    wrong[at] = with_sigma(wrong[at], float(f"{sigma:.6g}"))
    assert any("expected noise of σ 0.0363923" in one for one in judge_run(folder(wrong)).faults)


@pytest.mark.parametrize(("key", "value"), [("target", 0.5), ("source", "entropy"), ("decision", "start")])
def test_what_the_controller_says_of_a_decision_is_checked(key, value, folder):
    records = records_of(RUN)
    (record,) = (one for one in records if one["kind"] == "control" and one["step"] == 3)
    record[key] = value
    assert any(
        one.startswith(f"step 3: {key} of the controller is {value}") for one in judge_run(folder(records)).faults
    )


def test_a_record_of_a_step_that_the_run_does_not_have_is_found(folder):
    records = records_of(RUN)
    for step in (0, -3, 5, 10**9, 2.5):
        one = next(one for one in records if one["kind"] == "control") | {"step": step}
        at = next(n for n, one in enumerate(records) if one["kind"] == "control")
        assert judge_run(folder([*records[:at], one, *records[at + 1 :]])).faults


def test_a_controller_s_record_in_a_run_without_controller_is_found(tmp_path):
    (other,) = (run for run in REAL if run.name == "rollout")
    shutil.copytree(other, copied := tmp_path / "run")
    records = records_of(other)
    record = next(one for one in records_of(RUN) if one["kind"] == "control")
    at = next(n for n, one in enumerate(records) if one["kind"] == "adapter" and one["step"] == 1)
    (copied / EVIDENCE).write_bytes(b"".join(line + b"\n" for line in lines_of([*records[:at], record, *records[at:]])))
    faults = judge_run(RunFolder(copied)).faults
    assert "there is a record of control, but the run's config has no aqn.noise.control" in faults


def test_the_report_shows_target_and_measurement():
    page = page_of(RUN)
    for text in (
        "kl measured in 4 of 4 steps; σ moved in 3, was at a bound in 0; in step 4 0.03721 nats a token, "
        "target 0.06105",
        "as ordered by the controller in 4 of 4 readings, in 5 modules",
        "Target of σ Nats a token: the entropy or the KL that σ follows",
        "0.05, then by kl",
    ):
        assert text in page.text, text


def test_the_table_at_the_end_has_the_first_and_the_last_sigma_of_many():
    (column,) = (one for one in sigma_table(RunFolder(RUN)).columns if one.header == "σ target")
    assert list(column.cells) == ["5.00e-02 to 3.64e-02"]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_lost_record_is_found_in_every_step(step, folder):
    records = [one for one in records_of(RUN) if (one["kind"], one.get("step")) != ("control", step)]
    assert f"no record of control for step {step}" in judge_run(folder(records)).faults
