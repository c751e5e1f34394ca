"""What must not happen: code from checkpoints, models or responses that runs, and secrets that others can read."""

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from verl_aqn.config.compose import load_recipe, recipe_names

PACKAGE = Path(__file__).parents[2] / "verl_aqn"
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLE = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("cloudpickle", "load"),
    ("cloudpickle", "loads"),
    ("yaml", "load"),
}


def test_no_code_is_made_from_data():
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call):
                check(call, f"{path}:{call.lineno}")


def check(call, where):
    if isinstance(call.func, ast.Name):
        assert call.func.id not in RUNS_CODE, where
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        name = (call.func.value.id, call.func.attr)
        assert name not in UNPICKLE, where
        if name == ("torch", "load"):
            assert any(k.arg == "weights_only" and ast.literal_eval(k.value) for k in call.keywords), where
    for keyword in call.keywords:
        if keyword.arg in ("trust_remote_code", "shell"):
            assert ast.literal_eval(keyword.value) is False, where


@pytest.mark.parametrize("recipe", recipe_names())
def test_no_recipe_trusts_remote_code(recipe):
    text = OmegaConf.to_yaml(load_recipe(recipe, ["profile=cpu"]), resolve=True)
    found = {line.strip() for line in text.splitlines() if "trust_remote_code" in line}
    assert found
    assert found <= {"trust_remote_code: false", "trust_remote_code: null"}  # null: as of the model


LOAD = """
import sys, torch
import verl_aqn.integrations.verl.engine
from verl_aqn.runs.checkpoints import weights_only
with weights_only():
    state = torch.load(sys.argv[1], weights_only=False)  # as verl's checkpoint manager does
print(sorted(state))
torch.load(sys.argv[2], weights_only=False)  # and its messages between processes are not checkpoints
print("message")
with weights_only():
    torch.load(sys.argv[3], weights_only=False)
print("loaded")
"""


def load_as_a_run_does(good: Path, message: Path, bad: Path) -> subprocess.CompletedProcess:
    from verl_aqn.cluster.process_environment import engine_environment

    env = engine_environment(str(good.parent), cpu=True, ranks=1)
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", LOAD, str(good), str(message), str(bad)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


class Harmful:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_is_loaded_as_weights_and_never_run(tmp_path):
    rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch.save(TensorDict({"ids": torch.ones(2)}, batch_size=2), tmp_path / "message.pt")
    torch.save({"lr_scheduler": scheduler.state_dict(), "rng": rng}, tmp_path / "good.pt")
    torch.save({"rng": Harmful(tmp_path / "harmed")}, tmp_path / "bad.pt")
    done = load_as_a_run_does(*(tmp_path / f"{name}.pt" for name in ("good", "message", "bad")))
    assert done.stdout.splitlines()[-2:] == ["['lr_scheduler', 'rng']", "message"], done.stderr  # and no "loaded"
    assert done.returncode != 0
    assert "Weights only load failed" in done.stderr
    assert not (tmp_path / "harmed").exists()
