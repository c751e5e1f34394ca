"""Every private place of a host that this package relies on is recorded with its source, and has a guard."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import seams

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    return seams.seams()


def test_the_list_is_complete_and_every_seam_has_a_guard(found):
    assert set(found) == set(seams.read()), "python -m tests.helpers.seams --write"
    for path in set().union(*found.values()):
        guards = seams.guards_of(path)
        assert guards, f"{path} has seams, but no guard in tests/helpers/seams.py"
        assert all((ROOT / guard).exists() for guard in guards), guards


def test_the_hosts_sources_are_those_that_were_read(found):
    """If a new version of a host changes one: read the difference, run its guard, and record it anew."""
    recorded = seams.read()
    changed = {seam: path for seam, path in found.items() if recorded.get(seam) != seams.source_of(seam)}
    assert changed == {}
    assert "absent" not in recorded.values()


def test_seams_of_every_kind_are_found(found):
    """A private function, a replaced attribute, an overridden method, a method with another owner, and a copy.

    Overridden methods also in a class of ours on a class of ours, in a mixin, and in a class behind Ray's wrapper.
    """
    assert {
        "vllm.model_executor.models.registry:_run_in_subprocess",
        "verl.workers.rollout.vllm_rollout.vllm_async_server:run_uvicorn",
        "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync.on_step_end",
        "verl.trainer.ppo.v1.trainer_base:PPOTrainer._save_checkpoint",
        "verl.trainer.main_ppo:TaskRunnerV1.run",
        "verl.trainer.ppo.v1.trainer_base:PPOTrainer._validate",
        "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.forward_step",
        "verl.experimental.agent_loop.agent_loop:AgentLoopWorker._run_agent_loop",
    } <= set(found)


def test_a_changed_source_is_noticed_and_a_changed_docstring_is_not(tmp_path, monkeypatch):
    def digest(text: str, name: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return seams.source_of(f"{name}:f")

    monkeypatch.syspath_prepend(tmp_path)
    before = digest('def f(a):\n    """One."""\n    return a\n', "seam_one")
    assert digest('def f(a):\n    """Two."""\n    # three\n    return a\n', "seam_two") == before
    assert digest("def f(a, b=1):\n    return a\n", "seam_three") != before
    assert seams.source_of("seam_one:g") == "absent"
    assert digest("f = {}\n", "seam_four") == "value"


def test_the_script_for_other_versions_says_what_it_takes():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "check_hosts.sh")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 2
    assert "check_hosts.sh verl==" in done.stderr
