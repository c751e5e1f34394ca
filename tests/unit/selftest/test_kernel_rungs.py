"""The rungs that need torch alone: they run without any other package, and each fails when its subject is broken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from verl_aqn.mxfp4 import linear
from verl_aqn.mxfp4.kernels import native, reference
from verl_aqn.selftest import definition, devices, machine_rung
from verl_aqn.selftest.child import answer
from verl_aqn.selftest.rung import FAILED, PASSED, Context

ROOT = Path(__file__).parents[3]
# Everything that the project installs and torch does not need. numpy is optional for torch.
BLOCKED = (
    "verl", "vllm", "ray", "peft", "transformers", "omegaconf", "hydra", "typer", "rich", "psutil", "safetensors",
    "numpy", "scipy", "datasets", "compressed_tensors", "accelerate", "tokenizers", "matplotlib", "jinja2",
    "tensordict",
)  # fmt: skip
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""


def status(does: str, tmp_path: Path, device: str = "cpu") -> tuple[str, str]:
    said = answer(does, Context(device, 1, tmp_path, kernels=True))
    return said["status"], said["why"]


def test_kernels_only_runs_without_any_other_package(tmp_path):
    (tmp_path / "blocker").mkdir()
    (tmp_path / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'blocker'}{os.pathsep}{ROOT}"}
    for name in BLOCKED:
        code = f"import {name}"
        tried = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert f"No module named '{name}' (blocked)" in tried.stderr
    command = [sys.executable, "-m", "verl_aqn.selftest", "--kernels-only", "--json", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["status"] for row in found["rungs"]] == [PASSED] * 4
    assert found == json.loads((tmp_path / "out" / "selftest.json").read_text())


def test_the_definition_is_the_one_in_numpy():
    from tests.helpers import mxfp4_definition as numpy_definition
    from verl_aqn.selftest.codec_rungs import SEED, inputs

    x = inputs(torch.float32)
    for rule in ("mse", "even", "floor", "rceil"):
        for rounding in ("nearest", "half_away", "stochastic"):
            packed, scale = numpy_definition.quantize(x.numpy(), rule, rounding, SEED)
            ours = definition.quantize(x.tolist(), rule, rounding, SEED)
            assert (packed.tolist(), scale.tolist()) == (ours[0], ours[1]), (rule, rounding)


def one_bit(kernel, name: str, place: int):
    """A kernel whose last argument but `place` has one bit more."""
    right = getattr(kernel, name)

    def wrong(*arguments):
        right(*arguments)
        out = arguments[place].view(-1)
        if out.dtype == torch.uint8:
            out[-1] ^= 1
        else:
            out[-1] = out[-1] + 1

    return wrong


@pytest.mark.parametrize(
    ("name", "place"), [("quantize", -2), ("quantize", -1), ("fake_quantize", -1), ("dequantize", -1)]
)  # fmt: skip
def test_one_wrong_bit_of_a_kernel_fails(monkeypatch, tmp_path, name, place):
    if not native.available():
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(native, name, one_bit(native, name, place))
    assert status("codec_rungs.bits", tmp_path)[0] == FAILED


@pytest.mark.parametrize(("rule", "carry"), [("even", 0), ("rceil", 0x200000)])
def test_a_wrong_rule_fails_also_where_plain_pytorch_is_the_kernel(monkeypatch, tmp_path, rule, carry):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setitem(reference._CARRY, rule, carry)
    found, why = status("codec_rungs.bits", tmp_path)
    assert found == FAILED
    assert f"quantise {rule}" in why


def test_wrong_random_numbers_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "available", lambda: False)
    right = reference.uniform24
    monkeypatch.setattr(reference, "uniform24", lambda index, seed: right(index, seed + 1))
    found, why = status("codec_rungs.bits", tmp_path)
    assert (found, "stochastic" in why) == (FAILED, True)


def test_a_kernel_that_is_slower_than_plain_pytorch_fails(monkeypatch, tmp_path):
    plain = reference.quantize

    def slow(x, *arguments):
        time.sleep(3)
        plain(x, *arguments)

    monkeypatch.setattr("verl_aqn.selftest.codec_rungs.SIDE", 512)
    monkeypatch.setattr("verl_aqn.mxfp4.codec._kernel", lambda *_: type("K", (), {**vars(native), "quantize": slow}))
    found, why = status("codec_rungs.speed", tmp_path)
    assert (found, "plain PyTorch" in why) == (FAILED, True), why


def scaled(factor: float):
    right = linear._short_lived
    return lambda *arguments: right(*arguments) * factor


def backward(change):
    right = linear.PackedProduct.backward

    def wrong(ctx, grad):
        return change(*right(ctx, grad))

    return staticmethod(wrong)


LINEAR_FAULTS = {
    "a weight that is 1 % too large": (linear, "_short_lived", scaled(1.01)),
    "a gradient that is 1 % too large": (
        linear.PackedProduct, "backward", backward(lambda x, p, s, b: (x * 1.01, p, s, b))
    ),
    "a gradient of zero": (linear.PackedProduct, "backward", backward(lambda x, p, s, b: (x * 0, p, s, b))),
    "a bias without its gradient": (linear.PackedProduct, "backward", backward(lambda x, p, s, b: (x, p, s, b * 0))),
    "a kept copy of another weight": (linear.Mxfp4Linear, "_kept_weight", lambda self: self.weight * 2),
    "a 16-bit weight that backward keeps": (
        linear.PackedProduct, "apply",
        lambda x, p, s, b: torch.nn.functional.linear(x, linear.dequantize(p, s, x.dtype), b),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", LINEAR_FAULTS)
def test_a_broken_packed_layer_fails(monkeypatch, tmp_path, fault):
    monkeypatch.setattr("verl_aqn.selftest.linear_rung.SPEED", (8, 64, 64))
    assert status("linear_rung.check", tmp_path)[0] == PASSED
    monkeypatch.setattr(*LINEAR_FAULTS[fault])
    assert status("linear_rung.check", tmp_path)[0] == FAILED


def test_a_device_that_does_not_answer_fails(tmp_path):
    found, why = status("machine_rung.examine", tmp_path, "npu")
    assert (found, "no npu device answers" in why) == (FAILED, True)


def test_a_device_that_computes_wrongly_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.torch, "eye", lambda n, **more: torch.ones(n, n))
    assert status("machine_rung.examine", tmp_path)[0] == FAILED


def test_a_plugin_that_does_not_load_fails(monkeypatch, tmp_path):
    from types import SimpleNamespace

    node = SimpleNamespace(missing=["vLLM plugin"], plugins={"vLLM plugin": "No module named x"}, devices=[])
    monkeypatch.setattr("verl_aqn.preflight.node.local_node", lambda *_: node)
    monkeypatch.setattr(machine_rung.devices, "find", lambda _: ("cpu", 1))
    said = answer("machine_rung.examine", Context("cpu", 1, tmp_path))
    assert (said["status"], said["why"]) == (
        FAILED,
        "vLLM plugin does not load in a new process: No module named x",
    )
