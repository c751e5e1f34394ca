"""`verl-aqn runs`, and a run's record of where it came from."""

import hashlib
import io
import json
import os
import subprocess

import pytest
from rich.console import Console as RichConsole
from typer.testing import CliRunner

from tests.helpers.run_folders import begin_run, end_run
from verl_aqn.cli.main import app, main
from verl_aqn.errors import DataError
from verl_aqn.runs import run_list as listing
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.provenance import checkout, checkout_fault, device, provenance
from verl_aqn.runs.run_list import describe, find_runs, sigmas, table

CONFIG = {
    "aqn": {"seed": 3, "noise": {"enabled": True, "sigma_start": 0.05, "sigma_end": 1e-5}},
    "trainer": {"experiment_name": "e12", "total_training_steps": 29},
}


def make(base, status: str | None = "finished", config: dict | None = CONFIG) -> RunFolder:
    run = begin_run(base, config) if config else open_run(base, {}, fresh=True)
    run.append("evidence.jsonl", {"kind": "base", "disk": "b" * 64})
    for step in (0, 1, 2):
        run.append("metrics.jsonl", {"kind": "validation", "step": step, "accuracy": 0.25 * step, "items": 40})
        run.append("evidence.jsonl", {"kind": "adapter", "sent": f"adapter {step}"})
    run.append("metrics.jsonl", {"kind": "step", "step": 2, "metrics": {}})
    return end_run(run, status)


def test_a_run_in_plain_values(tmp_path):
    row = describe(make(tmp_path / "base"))
    assert (row["recipe"], row["status"], row["step"], row["steps"], row["seed"]) == ("e12", "finished", 2, 29, 3)
    assert (row["accuracy"], row["items"]) == (0.5, 40)
    assert (row["base"], row["adapter"]) == ("b" * 64, "adapter 2")
    assert 0 <= row["minutes"] < 1
    json.dumps(row)


def test_a_copied_run_took_as_long_as_it_took(tmp_path):
    run = make(tmp_path / "base")
    os.utime(run.path / "metrics.jsonl", (2e9, 2e9))
    assert 0 <= describe(run)["minutes"] < 1
    dead = make(tmp_path / "other", status=None)
    os.utime(dead.path / "metrics.jsonl", (2e9, 2e9))
    assert describe(dead)["minutes"] > 1  # its last sign of life


@pytest.mark.parametrize("name", ["e12[v2]", "a[/b]"])
def test_a_name_with_brackets_is_listed_whole(tmp_path, name):
    run = make(tmp_path / "base", config=CONFIG | {"trainer": {"experiment_name": name, "total_training_steps": 29}})
    shown = io.StringIO()
    RichConsole(file=shown, width=200).print(table([describe(run)]))
    assert name in shown.getvalue()


def test_a_run_that_nobody_holds_is_dead(tmp_path):
    assert describe(make(tmp_path / "base", status=None))["status"] == "dead"
    run = open_run(tmp_path / "other", {})
    assert describe(run)["status"] == "running"
    run.close()


def test_records_of_an_older_version_are_read(tmp_path):
    row = describe(make(tmp_path / "base", config={"trainer": {"total_training_steps": 5}}))
    assert (row["recipe"], row["seed"], row["noise"], row["steps"]) == (None, None, None, 5)
    assert describe(make(tmp_path / "bare", config=None))["steps"] is None


def test_runs_are_found_from_above_and_from_within_oldest_first(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert [run.path for run in find_runs(tmp_path)] == [first.path, second.path]
    assert [run.path for run in find_runs(tmp_path / "a")] == [first.path]
    assert [run.path for run in find_runs(second.path)] == [second.path]
    (tmp_path / "c").mkdir()
    (tmp_path / "e").touch()
    says = {"c": "contains no runs", "d": "does not exist", "e": "is not a folder"}
    for name, what in says.items():
        with pytest.raises(DataError, match=what):
            find_runs(tmp_path / name)


def test_without_a_folder_a_plan_s_runs_are_found_too(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "DEFAULT_BASES", str(tmp_path / "mxfp4_*"))
    made = [make(tmp_path / "mxfp4_e12"), make(tmp_path / "mxfp4_plan_p" / "noisy-seed0")]
    make(tmp_path / "other")
    assert [run.path for run in find_runs()] == [run.path for run in made]


def test_command(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", status="failed", config={"aqn": {"noise": {"enabled": False}}})
    shown = CliRunner().invoke(app, ["runs", str(tmp_path)])
    assert shown.exit_code == 0
    assert "50.0 % [35.2, 64.8]" in shown.stdout
    assert "0.05 → 1e-05" in shown.stdout
    assert [word in shown.stdout for word in ("finished", "failed", "2/29", "2/?", "off")] == [True] * 5
    rows = json.loads(CliRunner().invoke(app, ["runs", str(tmp_path), "--json"]).stdout)
    assert [row["status"] for row in rows] == ["finished", "failed"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{}"),
        ("state.json", "[]"),
        ("state.json", ""),
        ("config.yaml", "a: ["),
        ("config.yaml", "hello"),
        ("config.yaml", b"\xff"),
        ("metrics.jsonl", "5\n"),
        ("evidence.jsonl", "{}\n{broken}\n"),
    ],
)
def test_a_damaged_run_is_a_row_and_the_others_are_listed(tmp_path, monkeypatch, capsys, file, content):
    damaged, whole = make(tmp_path / "a"), make(tmp_path / "b")
    (damaged.path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr("sys.argv", ["verl-aqn", "runs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert not ended.value.code
    assert [word in out for word in (damaged.path.name, "damaged", whole.path.name, "finished")] == [True] * 4
    assert err.count("\n") == 1
    assert f"{damaged.path / file}" in err
    rows = json.loads(CliRunner().invoke(app, ["runs", str(tmp_path), "--json"]).stdout)
    assert {row["status"] for row in rows} == {"damaged", "finished"}
    assert rows[0].keys() == rows[1].keys()


def test_provenance_names_commit_device_and_data(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"rows")
    found = provenance([tmp_path / "train.parquet"], tmp_path)
    assert found["data"] == {"train.parquet": hashlib.sha256(b"rows").hexdigest()}
    assert found["torch"]
    assert found["device"] == device() != ""
    json.dumps(found)


def test_files_of_one_name_are_all_on_record(tmp_path):
    files = [tmp_path / place / "test.parquet" for place in ("gsm8k", "math")]
    for file in files:
        file.parent.mkdir()
        file.write_text(file.parent.name)
    found = provenance(files, tmp_path)["data"]
    assert found == {f"{name}/test.parquet": hashlib.sha256(name.encode()).hexdigest() for name in ("gsm8k", "math")}


@pytest.mark.parametrize(
    ("file", "decides"), [("model.safetensors", True), ("config.json", True), ("chat_template.jinja", True),
                          ("quantization.json", False), ("README.md", False)]
)  # fmt: skip
def test_a_base_is_told_apart_by_what_decides_its_answers(tmp_path, file, decides):
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "quantization.json", "README.md"):
        (tmp_path / name).write_text("as it was")
    before = provenance([], tmp_path)["base"]
    (tmp_path / file).write_text("changed")
    assert (provenance([], tmp_path)["base"] != before) == decides


@pytest.mark.parametrize(
    ("tool", "says", "device_on_record"),
    [
        # Published output for a card with one chip and one with two dies. Not tested on an NPU.
        (
            "npu-smi",
            "\tNPU ID  Chip ID  Chip Logic ID  Chip Name  \n\t0  0  0  Ascend 910B3   \n\t0  1  -  Mcu  \n",
            "1 x Ascend 910B3",
        ),
        (
            "npu-smi",
            "NPU ID  Chip Phy-ID  Chip Name\n0 0 0 0 Ascend910\n0 1 1 1 Ascend910\n0 2 - - Mcu\n",
            "2 x Ascend910",
        ),
        ("nvidia-smi", "NVIDIA H100 80GB HBM3\nNVIDIA H100 80GB HBM3\n", "2 x NVIDIA H100 80GB HBM3"),
    ],
)
def test_accelerators_are_the_device(tmp_path, monkeypatch, tool, says, device_on_record):
    (tmp_path / "says").write_text(says)
    (tmp_path / tool).write_text(f"#!/bin/sh\ncat {tmp_path / 'says'}\n")
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert device() == device_on_record


def test_an_image_has_the_commit_that_it_was_built_from(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_COMMIT", "1f2e")
    assert checkout(tmp_path) == {"commit": "1f2e", "dirty": None}
    monkeypatch.setenv("VERL_AQN_COMMIT", "")  # built without one
    assert checkout(tmp_path) == {"commit": None, "dirty": None}


def test_a_checkout_is_dirty_with_a_change_or_a_new_file(tmp_path):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    assert checkout(tmp_path) == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = checkout(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "new").write_text("2")
    assert checkout(tmp_path) == clean | {"dirty": True}
    git("config", "status.showUntrackedFiles", "no")
    assert checkout(tmp_path) == clean | {"dirty": True}


def test_a_checkout_that_git_does_not_read_is_not_clean(tmp_path, monkeypatch):
    """The usual case in a container: the checkout is mounted and belongs to another user."""
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    unknown = {"commit": None, "dirty": None}
    assert checkout(tmp_path) == unknown, "no commit yet"
    monkeypatch.setenv("VERL_AQN_COMMIT", "1f2e")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert checkout(tmp_path) == unknown
    fault = checkout_fault(tmp_path)
    assert fault.startswith(f"git refuses {tmp_path} (fatal: detected dubious ownership")
    assert fault.endswith(f"): git config --global --add safe.directory {tmp_path}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout(tmp_path) == unknown, "the image's commit is not that of a checkout mounted into it"
    assert checkout_fault(tmp_path) == f"{tmp_path} is a checkout, but git is not installed: install git"
    assert checkout_fault(tmp_path / "installed") == ""


def test_a_constant_sigma_has_no_end():
    noise = {"enabled": True, "sigma_start": 0.005, "sigma_end": 5e-4}
    assert sigmas(noise | {"kind": "exponential"}) == sigmas(noise) == "0.005 → 0.0005"
    assert sigmas(noise | {"kind": "constant"}) == "0.005"
    assert sigmas(noise | {"enabled": False}) == "off"
    assert (sigmas(None), sigmas({"sigma_start": 1})) == ("–", "1 → ?")
