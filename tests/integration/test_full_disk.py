"""A disk that fills up in a run: the run ends with that as its line, loses nothing, and goes on where there is room."""

import json
import os
import subprocess
import sys

from tests.integration.conftest import TINY, leftovers


def test_a_full_disk_is_the_line_and_the_same_command_goes_on_where_there_is_room(tmp_path, tiny_model, warm_cache):
    disk = tmp_path / "disk"
    disk.mkdir()
    places = [f"actor_rollout_ref.model.path={tiny_model}", f"aqn.run.dir={disk}", "trainer.val_before_train=false"]
    short = ["trainer.total_training_steps=2", "aqn.noise.num_stages=2", "trainer.test_freq=-1"]
    train = [sys.executable, "-m", "verl_aqn.cli", "train", "e12_aggressive_1ep", *TINY, *short, *places]
    small = [sys.executable, "-m", "tests.integration.small_disk", str(disk), *train]
    rights = [] if os.geteuid() == 0 else ["--map-root-user"]
    env = {**os.environ, "VERL_AQN_CACHE": str(warm_cache)}
    before = leftovers()
    done = subprocess.run(
        ["unshare", "--mount", *rights, *small], capture_output=True, text=True, timeout=600, check=False, env=env
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stderr[-3000:]
    full, after = json.loads(results[0].removeprefix("RESULT "))
    assert leftovers() <= before
    line = full["said"].strip().splitlines()[-1]
    assert full["code"] == 1, full["said"] + full["log"]
    assert "disk is full" in line, full["said"] + full["log"]
    assert str(disk) in line, line
    assert "free some space" in line, line
    assert "Traceback" not in full["said"]
    assert full["seconds"] < 40
    assert (after["code"], after["state"]["status"]) == (0, "finished"), after["said"] + after["log"]
    assert after["run"] == full["run"], "the same run goes on"
    steps = {record["step"]: record for record in after["metrics.jsonl"] if record["kind"] == "step"}
    assert sorted(steps) == [1, 2]
