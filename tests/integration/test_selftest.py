"""The ladder on a CPU, and each of its rungs with its subject broken: none may pass."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ask_vllm, leftovers
from tests.integration.selftest_faults import FAULTS
from verl_aqn.runs.folder import RunFolder
from verl_aqn.selftest.ladder import RUNGS
from verl_aqn.selftest.rung import FAILED, NOT_RUN, PASSED, Broken
from verl_aqn.selftest.scrub import owner

ELSEWHERE = {"sleep-wake", "graph-noise", "fusion-noise", "tensor-parallel"}


@pytest.fixture(scope="module")
def climbed(tmp_path_factory, warm_cache) -> Path:
    """The folder of `verl-aqn selftest`."""
    folder = tmp_path_factory.mktemp("selftest") / "out"
    options = ["-o", str(folder), "--minutes", "14", "--device", "cpu"]
    command = [sys.executable, "-m", "verl_aqn.cli", "selftest", *options]
    before = leftovers()
    env = {**os.environ, "VERL_AQN_CACHE": str(warm_cache)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=860, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert leftovers() <= before
    return folder


def test_every_rung_of_a_cpu_passes(climbed):
    found = json.loads((climbed / "selftest.json").read_text())
    status = {row["name"]: row["status"] for row in found["rungs"]}
    assert status == {rung.name: NOT_RUN if rung.name in ELSEWHERE else PASSED for rung in RUNGS}
    assert all(row["figure"] for row in found["rungs"] if row["status"] == PASSED)
    assert (found["device"], found["failed"], found["not_run"]) == ("cpu", 0, len(ELSEWHERE))


def test_page_and_document_do_not_say_whose_machine_it_is(climbed):
    whose = owner()
    for name in ("selftest.md", "selftest.json"):
        text = (climbed / name).read_text()
        for secret in (*whose.hosts, *whose.users, platform.node()):
            assert not re.search(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", text, re.IGNORECASE), secret
        for secret in (*whose.homes, str(climbed), str(Path.cwd()), sys.prefix, "/tmp", "127.0.0.1", "/home", "/root"):
            assert secret not in text, secret


@pytest.fixture
def run(climbed, tmp_path) -> RunFolder:
    from verl_aqn.selftest.run_rungs import newest

    shutil.copytree(newest(climbed / "work" / "run" / "run").path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def rewrite(run: RunFolder, change) -> None:
    file = run.path / "evidence.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(one) + "\n" for one in map(change, records) if one is not None))


DOCTORED = {
    "a step without noise": lambda r: None if r["kind"] == "noise" and r["step"] == 1 else r,
    "noise of another σ": lambda r: r | {"sigma_measured": 0.2} if r["kind"] == "noise" and r["step"] == 1 else r,
    "no base at the end": lambda r: None if r["kind"] == "base" and r["when"] == "end" else r,
    "another adapter in the rollout": lambda r: r | {"sent": "0" * 64} if r["kind"] == "adapter" else r,
    "no mismatch": lambda r: None if r["kind"] == "mismatch" else r,
    "trainer and rollout apart": lambda r: r | {"abs_dlogp_mean": 3.0} if r["kind"] == "mismatch" else r,
    "nothing": lambda r: None,
}


def test_the_run_of_the_ladder_is_judged_again(run):
    from verl_aqn.selftest.run_rungs import judged

    assert "records of evidence are right" in judged(run).figure


@pytest.mark.parametrize("fault", DOCTORED)
def test_a_run_whose_evidence_is_wrong_fails(run, fault):
    from verl_aqn.selftest.run_rungs import judged

    rewrite(run, DOCTORED[fault])
    with pytest.raises(Broken):
        judged(run)


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict:
    return ask_vllm("selftest_faults", tmp_path_factory.mktemp("faults") / "out")


def test_the_rungs_of_the_engine_pass_before_and_after_the_faults(broken):
    for when in ("nothing", "nothing again"):
        assert {name: one["why"] for name, one in broken[when].items()} == dict.fromkeys(broken[when], "")


@pytest.mark.parametrize("fault", FAULTS)
def test_no_rung_passes_when_its_subject_is_broken(broken, fault):
    assert broken[fault]["status"] == FAILED
    assert broken[fault]["why"]


def test_the_rung_of_two_ranks_passes_on_two_cores(tmp_path):
    """The ladder runs it on accelerators alone; here are its code and what it compares."""
    said = ask_vllm("selftest_faults", tmp_path / "out", "pair")["two ranks"]
    assert (said["status"], said["why"]) == (PASSED, "")
    assert said["figures"]["norms"] == 5
