"""A resumed run: its request is recorded whenever it died, and a change of versions is visible."""

import json
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from verl_aqn.cli import main as cli
from verl_aqn.cluster.process_environment import launched
from verl_aqn.config.compose import load_recipe
from verl_aqn.launch import train
from verl_aqn.launch.supervise import Outcome
from verl_aqn.launch.train import Prepared, launch
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.provenance import file_digest, own_code, provenance
from verl_aqn.runs.stats.arms import beyond, records_of, settings_of, versions_of


@pytest.fixture
def prepared(tmp_path) -> Prepared:
    data, model = tmp_path / "rows.parquet", tmp_path / "model"
    data.write_bytes(b"rows")
    model.mkdir()
    overrides = [f"data.train_files={data}", f"data.val_files={data}", f"actor_rollout_ref.model.path={model}"]
    config = load_recipe("e12", ["profile=cpu", *overrides])
    return Prepared(config=config, steps=29, rows={}, source=model)


def test_a_run_that_died_before_its_launch_gets_all_its_records_from_the_next_attempt(tmp_path, prepared, monkeypatch):
    run = open_run(tmp_path / "base", {})
    run.write_text("schedule.json", "[]")
    monkeypatch.setattr(train, "checkout_fault", lambda: "")
    run.close()
    run = open_run(tmp_path / "base", {})
    assert run.resumed
    assert launch(run, prepared) == []
    config, versions = records_of(run.path)
    assert config["aqn"]["noise"]["sigma_end"] == 5e-4
    assert versions == json.loads((run.path / "versions.json").read_text())
    assert (run.path / "schedule.json").read_text() == "[]"  # existing records are not changed
    run.close()


def test_a_run_that_goes_on_with_other_versions_says_so_and_is_like_no_other(tmp_path, prepared, monkeypatch):
    committed = {"commit": "1f2e", "dirty": False}
    monkeypatch.setattr(train, "provenance", lambda *what: provenance(*what) | committed)
    monkeypatch.setattr(train, "checkout_fault", lambda: "")
    run = open_run(tmp_path / "base", {})
    launch(run, prepared)
    began = versions_of(run.path)
    run.close()
    run = open_run(tmp_path / "base", {})
    assert launch(run, prepared) == []
    assert versions_of(run.path) == began
    run.close()
    (tmp_path / "rows.parquet").write_bytes(b"other rows")
    monkeypatch.setattr(train, "provenance", lambda *what: provenance(*what) | committed | {"torch": "3.0"})
    run = open_run(tmp_path / "base", {})
    changed = launch(run, prepared)
    assert [text.split(" to ")[0] for text in changed] == [
        f"data.rows.parquet changed from {began['data']['rows.parquet']}",
        f"torch changed from {began['torch']}",
    ]
    mixed = versions_of(run.path)
    assert mixed["torch"] == f"{began['torch']} → 3.0"
    assert mixed["commit"] == began["commit"]
    both = [settings_of({"versions": one}) for one in (began, mixed)]
    assert beyond([], both) == "versions.data.rows.parquet, versions.torch"
    run.close()


def test_a_reward_function_that_was_changed_is_another_version(tmp_path, prepared, monkeypatch):
    reward = tmp_path / "reward.py"
    reward.write_text("def compute_score(**told):\n    return 0\n")
    key = "reward.custom_reward_function.path"
    assert "code" not in train.versions_now(prepared.config), "pkg://verl_aqn... is known by its commit"
    OmegaConf.update(prepared.config, key, str(reward))
    monkeypatch.setattr(train, "checkout_fault", lambda: "")
    run = open_run(tmp_path / "base", {})
    launch(run, prepared)
    began = versions_of(run.path)
    assert began["code"] == {key: file_digest(reward)}
    run.close()
    reward.write_text("def compute_score(**told):\n    return 1\n")
    run = open_run(tmp_path / "base", {})
    assert any(text.startswith(f"code.{key} changed from {began['code'][key]} to ") for text in launch(run, prepared))
    both = [settings_of({"versions": one}) for one in (began, versions_of(run.path))]
    assert beyond([], both) == f"versions.code.{key}"
    assert beyond(["reward"], [one | {key: str(reward)} for one in both]) == ""
    run.close()


def test_the_code_of_a_package_is_that_of_its_module():
    found = own_code(
        {"a": "pkg://yaml.nodes", "b": "pkg://no_such.module", "c": None, "d": "pkg://verl_aqn.tasks.gsm8k"}
    )
    assert found == {"a": file_digest(Path(yaml.__file__).with_name("nodes.py"))}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ({"commit": None, "dirty": None}, "no commit is on record"),
        ({"commit": "1f2e", "dirty": True}, "it has changes that are not committed"),
    ],
)
def test_a_run_whose_code_is_not_known_says_so_when_it_goes_on(tmp_path, prepared, monkeypatch, code, why):
    monkeypatch.setattr(train, "provenance", lambda *what: provenance(*what) | code)
    monkeypatch.setattr(train, "checkout_fault", lambda: "git refuses it")
    first = "the commit of this run's code is not known: git refuses it"
    run = open_run(tmp_path / "base", {})
    assert launch(run, prepared) == [first]
    monkeypatch.setattr(train, "checkout_fault", lambda: "")
    assert launch(run, prepared) == [f"the code may have changed since the run began, which cannot be checked: {why}"]
    run.close()


@pytest.mark.parametrize(("number", "by"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_run_that_a_signal_ended_is_on_record_and_has_the_signal_s_exit_code(
    tmp_path, prepared, monkeypatch, capsys, number, by
):
    calls = []

    def supervise(run, console, ahead):
        calls.append(run.path)
        return Outcome("interrupted", f"stopped by {by}", signal=number)

    monkeypatch.setattr(train, "supervise", supervise)
    monkeypatch.setattr(train, "ready", lambda config: nullcontext((prepared, None)))
    monkeypatch.setattr(train, "warnings_of", lambda config: [])
    prepared.rows = {"train": 174, "test": 4}
    prepared.config.aqn.noise.probe = False
    prepared.config.aqn.run.restarts = 3
    monkeypatch.setattr(sys, "argv", ["verl-aqn", "train", "e12", f"aqn.run.dir={tmp_path / 'base'}"])
    prepared.config.aqn.run.dir = str(tmp_path / "base")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 128 + number
    assert len(calls) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    log = f"{calls[0]}/training.log"
    assert line == f"error: stopped by {by} (log: {log}): the same command resumes this run from its last checkpoint"
    assert RunFolder(calls[0]).state["status"] == "interrupted"


@pytest.mark.parametrize(("val_only", "validates"), [(False, False), (True, True)])
def test_a_run_that_only_validates_does_so_however_often_it_is_carried_on(tmp_path, prepared, val_only, validates):
    """If val_only is not followed by a validation before training, verl trains."""
    prepared.config.trainer.val_only = val_only
    run = open_run(tmp_path / "base", {})
    launch(run, prepared)
    assert launched(run).trainer.val_before_train is True
    run.append("metrics.jsonl", {"kind": "validation", "step": 0})
    launch(run, prepared)
    assert launched(run).trainer.val_before_train is validates
    run.close()
