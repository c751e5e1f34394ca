"""A plan of real runs that is killed in the middle and started again."""

import time

import yaml

from tests.integration.conftest import kill, leftovers, lines, newest

PLAN = {"arms": {"control": {"recipe": "e6a"}, "noisy": {"recipe": "e12_aggressive_1ep"}}}
SHORT = ["trainer.total_training_steps=1", "trainer.val_before_train=false", "aqn.noise.num_stages=1"]


def test_a_killed_plan_goes_on_where_it_was_and_ends_with_the_comparison(train, tmp_path):
    before = leftovers()
    file, out = tmp_path / "plan.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(PLAN))
    process = train(out, *SHORT, recipe=str(file))
    deadline = time.monotonic() + 500
    while not any("loading the actor" in str(lines(path)) for path in out.glob("noisy-seed0/runs/*/events.jsonl")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    kill(process)
    done = newest(out / "control-seed0")
    records = (done / "metrics.jsonl").read_bytes()

    process = train(out, *SHORT, recipe=str(file))
    stdout, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert "control, seed 0: finished before" in err
    assert "attempt 2" in err
    assert (done / "metrics.jsonl").read_bytes() == records
    assert len(list(out.glob("*/runs/2*"))) == 2
    assert "noisy against control: not enough data" in " ".join(stdout.split())
    assert leftovers() <= before
