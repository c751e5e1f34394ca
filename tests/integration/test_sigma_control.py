"""A real run whose σ follows its entropy: killed and resumed, each σ is what the rule gives for the records."""

import math
import time

import pytest

from tests.integration.conftest import finish, kill, lines, newest
from verl_aqn.runs.evidence import judge_run
from verl_aqn.runs.folder import EVIDENCE, RunFolder
from verl_aqn.runs.report.evidence_section import checks
from verl_aqn.runs.report.page_data import read_runs

STEPS = 6
# The tiny model's entropy is about 6.5 nats a token, so σ first rises, and falls later.
RULE = ["trainer.val_before_train=false", "trainer.save_freq=2", f"trainer.total_training_steps={STEPS}",
        "aqn.mismatch.rescore=0",
        "aqn.noise.control.target=entropy", "aqn.noise.control.gain=2", "aqn.noise.control.dead_band=0.01",
        "aqn.noise.control.value=[{step: 0, value: 9}, {step: 5, value: 4}]"]  # fmt: skip


def next_sigma(sigma: float, step: int, measured: float) -> float:
    """σ of `step` (from 0) by the rule, for errors outside the dead band, in plain numbers."""
    error = math.log(9 * (4 / 9) ** (step / 5) / measured)
    assert abs(error) > 0.01, "choose another target: this step tests nothing"
    return min(0.1, max(1e-5, sigma * math.exp(max(-math.log(2), min(math.log(2), 2 * error)))))


def test_a_killed_run_goes_on_with_the_sigma_of_its_rule(train, tmp_path):
    process = train(tmp_path, *RULE, recipe="kl_control")
    deadline = time.monotonic() + 700
    while 3 not in [record["step"] for run in tmp_path.glob("runs/*") for record in lines(run / EVIDENCE, "control")]:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kill(process)
    folder = newest(tmp_path)
    saved = (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert saved == "2", "the kill came too late: step 3 must be abandoned after its measurement is on record"
    run, err = finish(train(tmp_path, *RULE, recipe="kl_control"), tmp_path)
    assert run == folder
    assert "then by entropy" in err
    assert "9 → 4 nats a token" in err

    # What each step measured, in the order of the file; a repeated step replaces what was abandoned.
    sigmas, measured, seen = {0: 0.05}, {}, []
    for record in lines(run / EVIDENCE):
        step = record.get("step")
        if record["kind"] == "noise":
            if step:
                sigmas[step] = next_sigma(sigmas[step - 1], step, measured[step - 1])
            assert record["sigma_target"] == pytest.approx(sigmas[step], rel=1e-5)
            assert record["order"]["sigma"] == record["sigma_target"]
            seen.append(step)
        elif record["kind"] == "control":
            measured[step - 1] = record["measured"]
            assert record["reason"] == ""
    assert seen[:3] == [0, 1, 2]
    assert seen[-4:] == [2, 3, 4, 5]
    assert len(set(sigmas.values())) == STEPS
    assert max(sigmas.values()) > 0.05 > sigmas[STEPS - 1]

    steps = {record["step"]: record["metrics"] for record in lines(run / "metrics.jsonl", "step")}
    assert sorted(steps) == list(range(1, STEPS + 1))
    for step, metrics in steps.items():
        assert metrics["aqn/control/measured"] == metrics["aqn/mismatch/rollout_entropy_sampled"] == measured[step - 1]
        assert metrics["aqn/control/target"] == pytest.approx(9 * (4 / 9) ** ((step - 1) / 5), rel=1e-5)
        assert metrics["aqn/sigma"] == pytest.approx(sigmas[step - 1], rel=1e-5)
    # Validation has no noise, and the judge finds nothing.
    clean = [record for record in lines(run / EVIDENCE, "clean") if record["when"] == "validation"]
    assert clean
    assert all(record["sigma_measured"] == 0 for record in clean)
    judgement = judge_run(RunFolder(run))
    assert judgement.faults == []
    assert judgement.findings["control"].right >= STEPS
    rows = {row[0].text: row[1] for row in checks(read_runs([run])).rows}
    assert rows["σ by its controller, decided again from the records"].good is True
