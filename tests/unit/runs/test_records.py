"""Records outlive the code that wrote them: other programs and later versions of this one read them.

`old_run/` is a small run in the form of commit e5c6b7d (the first complete one) with made-up values. It has no separate
seed, no commit, device or data in versions.json, no order in the evidence, NaN as Python writes it, and a number as
`started` of a folder.
"""

import json
import math
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas
import pyarrow.json
import pytest
from rich.console import Console as RichConsole

from verl_aqn.errors import EnvironmentFault
from verl_aqn.launch import supervise
from verl_aqn.launch.console import Console, result_table, sigma_table
from verl_aqn.runs import temporary
from verl_aqn.runs.checkpoints import config_of
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.old_names import OLD_NAMES
from verl_aqn.runs.run_list import describe, find_runs
from verl_aqn.runs.stats.arms import read_run
from verl_aqn.runs.stats.verdict import compare_validations

OLD = Path(__file__).parent / "old_run"
FILES = ("metrics.jsonl", "evidence.jsonl", "events.jsonl")


@pytest.fixture
def old(tmp_path) -> RunFolder:
    shutil.copytree(OLD, tmp_path / "old")
    (run,) = find_runs(tmp_path / "old")
    return run


def shown(table) -> list[list[str]]:
    console = RichConsole(width=100)
    with console.capture() as captured:
        console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines() if "│" in line]


def test_an_old_run_is_listed_and_shown(old):
    row = describe(old)
    assert (row["status"], row["step"], row["steps"], row["seed"], row["minutes"] > 0) == ("finished", 2, 2, None, True)
    assert (row["accuracy"], row["flexible"], row["math_verify"], row["items"]) == (0.75, None, None, 4)
    assert (row["base"], row["adapter"]) == ("b" * 64, "2" * 64)
    assert shown(result_table(old)) == [
        ["0", "25.0 [4.6, 69.9]", "–", "–", "4"],
        ["2", "75.0 [30.1, 95.4]", "–", "–", "4"],
    ]
    assert shown(sigma_table(old)) == [["0", "0", "0", "0", "61"], ["1", "1", "5.00e-02", "5.010e-02", "61"]]
    change = compare_validations(old, 0, 2)
    assert (change.n, change.before, change.after, change.gained) == (4, 0.25, 0.75, 2)


def test_an_old_run_is_compared(old):
    run = read_run(old.path)
    assert (run.seed, sum(run.answers.right.values()), len(run.answers.right), run.answers.samples) == (None, 3, 4, 1)
    assert run.settings["aqn.noise.sigma_start"] == 0.05


def test_an_old_run_is_carried_on(old):
    """What its killed attempt left behind is looked for under the recorded name."""
    digest = open_run(old.path.parents[2] / "other", {}).state["config_digest"]
    state = old.state | {"status": "failed", "config_digest": digest}
    (old.path / "state.json").write_text(json.dumps(state))
    run = open_run(old.path.parents[1], {})
    assert (run.path, run.resumed) == (old.path, True)
    supervise.clean_after_killed(run)
    run.append("metrics.jsonl", {"kind": "validation", "step": 3, "accuracy": 1.0, "math_verify": 1.0, "items": 4})
    assert list(run.by_step("metrics.jsonl", "validation")) == [0, 2, 3]
    assert shown(result_table(run))[-1][1:4] == ["100.0 [51.0, 100.0]", "–", "100.0 [51.0, 100.0]"]


@pytest.mark.parametrize("key", ["since", "started"])  # the second uses an older name of the key
def test_the_folder_of_a_killed_attempt_is_removed(tmp_path, key):
    run = open_run(tmp_path / "base", {})
    left, lock = temporary.make(run.path)
    run.append("events.jsonl", {"kind": "temporary", "path": left, key: 0.0})
    supervise.clean_after_killed(run)
    assert Path(left).exists(), "an attempt that lives holds it"
    os.close(lock)
    supervise.clean_after_killed(run)
    assert not Path(left).exists()


def test_nothing_else_that_a_record_names_is_deleted(tmp_path):
    run, other = open_run(tmp_path / "base", {}), open_run(tmp_path / "other", {})
    (home := tmp_path / "home").mkdir()
    theirs, lock = temporary.make(other.path)
    os.close(lock)
    bare = Path(tempfile.mkdtemp(prefix=temporary.PREFIX, dir=temporary.ROOT))
    (linked := temporary.ROOT / f"{temporary.PREFIX}{bare.name}-link").symlink_to(home)
    temporary.claim(outside := tmp_path / "aqn-outside", run.path)
    temporary.claim(opened := Path(f"{bare}-open"), run.path)
    opened.chmod(0o755)
    (bare / "run").symlink_to(opened / "run")
    named = [home, Path(theirs), bare, linked, outside, opened]
    try:
        for path in (*named, f"{bare}/../../{home}", "/", "", "."):
            run.append("events.jsonl", {"kind": "temporary", "path": str(path), "since": 0.0})
        supervise.clean_after_killed(run)
        assert all(os.path.lexists(path) for path in named)
    finally:
        linked.unlink()
        for path in (theirs, bare, opened):
            shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_a_temporary_folder_that_another_user_made_first_is_refused(tmp_path):
    (folder := tmp_path / "aqn-known").mkdir(mode=0o700)
    os.chown(folder, 23456, 23456)
    with pytest.raises(EnvironmentFault, match="was created by another user"):
        temporary.claim(folder, tmp_path)
    assert not list(folder.iterdir())


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Every kind of record that a run writes, written as by trainer and supervisor."""
    run = open_run(tmp_path / "base", {})
    noise = {
        "sigma_target": 0.05,
        "unit": "rms",
        "groups": [{"modules": ["a"], "multiplier": 1.0}],
        "weights_digest": "d",
    }
    actual = [{"modules": 14, "adapter_digest": "d", "b_max": np.float32(0)}]
    base = {"disk": "d", "actor": ["d"], "rollout": [{"layers": 8, "slices": {}, "weights_equal_base": None}]}
    evidence = [
        {
            "kind": "strength",
            "clean": {"sigma": 0.0, "variance": None},
            "noisy": {"sigma": 0.05, "variance": [0, 0, 1]},
        },
        {"kind": "rollout", "norms": 5, "clean_digest": "d", "router_norms": []},
        {"kind": "base", "when": "start", **base},
        {"kind": "base", "when": "end", "quantised": False},
        {"kind": "adapter", "step": 0, "sent": "d", "actual": actual},
        {"kind": "noise", "rank": 0, "stage": 1, "step": 1, "order": {"seed": 0, "share": 0.5}, **noise},
        {"kind": "clean", "rank": 0, "step": None, "order": None, **noise, "groups": []},
    ]
    metrics = [
        {"kind": "validation", "step": 0, "accuracy": 0.5, "items": 2},
        {
            "kind": "step",
            "step": 1,
            "total": 1,
            "metrics": {"actor/grad_norm": math.nan, "aqn/sigma": np.float64(0.05)},
        },
        {"kind": "validation", "step": 1, "accuracy": 1.0, "flexible": 1.0, "math_verify": math.inf, "items": 2},
    ]
    events = [
        {"kind": "attempt", **run.state},
        {"kind": "temporary", "path": "/tmp/aqn-none", "since": 1.5},
        {"kind": "phase", "text": "rollout ready"},
        {"kind": "warning", "text": "…"},
        {"kind": "error", "text": "…"},
    ]
    for name, rows in zip(FILES, (metrics, evidence, events), strict=True):
        for row in rows:
            run.append(name, row)
    return run.path


@pytest.mark.parametrize("name", FILES)
def test_other_programs_read_the_records(mixed, name):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (mixed / name).read_text().splitlines()]
    table = pyarrow.json.read_json(mixed / name)
    frame = pandas.read_json(mixed / name, lines=True)
    assert table.column("kind").to_pylist() == frame["kind"].tolist() == [row["kind"] for row in rows]
    assert {key for row in rows for key in row} == set(table.column_names) == set(frame.columns)


def test_what_is_no_number_is_null_and_is_shown_as_nan(mixed, capsys):
    step, last = list(RunFolder(mixed).read("metrics.jsonl"))[1:]
    assert (step["metrics"]["actor/grad_norm"], step["metrics"]["aqn/sigma"], last["math_verify"]) == (None, 0.05, None)
    Console().record("metrics.jsonl", step | {"metrics": {"critic/score/mean": None}})
    assert "reward    nan" in capsys.readouterr().err


def test_an_old_runs_modules_have_todays_names(old):
    with (old.path / "config.yaml").open("a") as file:
        file.write("lib: verl_aqn.verl_api.engine\nreward: pkg://verl_aqn.rewards.gsm8k\n")
    config = config_of(old)
    assert (config.lib, config.reward) == ("verl_aqn.integrations.verl.engine", "pkg://verl_aqn.tasks.gsm8k")
    assert old.block("config.yaml")["lib"] == config.lib
    for name in OLD_NAMES.values():
        assert find_spec(name) is not None


def test_an_old_runs_fields_and_metrics_have_todays_names(tmp_path):
    words = (
        r'{"sigma_asked": 0.1, "aqn/parity/kernels/kl_k3": 0.2, "text": "\"sigma_asked\": \"aqn/parity/x\": ", "a": []}'
    )
    (tmp_path / "metrics.jsonl").write_text(words + "\n")
    (record,) = RunFolder(tmp_path).read("metrics.jsonl")
    text = '"sigma_asked": "aqn/parity/x": '
    assert record == {"sigma_target": 0.1, "aqn/mismatch/kernels/kl_k3": 0.2, "text": text, "a": []}


def test_the_two_sides_of_an_old_record_of_weights_have_todays_names_and_a_users_keys_keep_theirs(tmp_path):
    lines = (
        '{"kind": "adapter", "wanted": ["d"], "held": [{"adapter_digest": "d", "wanted": "d"}], "text": "held"}',
        '{"kind": "base", "holders": {"actor": {"packed": {"held": "d", "disk": "d"}}}}',
        '{"kind": "response", "held": 1, "wanted": 2}',
    )
    (tmp_path / "evidence.jsonl").write_text("".join(line + "\n" for line in lines))
    assert list(RunFolder(tmp_path).read("evidence.jsonl")) == [
        {"kind": "adapter", "expected": ["d"], "actual": [{"adapter_digest": "d", "expected": "d"}], "text": "held"},
        {"kind": "base", "holders": {"actor": {"packed": {"actual": "d", "disk": "d"}}}},
        {"kind": "response", "held": 1, "wanted": 2},
    ]
