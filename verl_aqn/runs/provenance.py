"""What a run came from: the commit, the machine, the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_PACKAGES = (
    "verl-aqn", "verl", "vllm", "ray", "torch", "transformers", "peft", "tensordict", "TransferQueue", "numpy",
    "math-verify",
)  # fmt: skip


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that there are."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(data_files: Iterable[str | Path]) -> dict[str, Any]:
    """All that a result can depend on beside its config.

    `python`, `machine` and the installed packages' versions; `commit` and `dirty` of the checkout that verl-aqn runs
    from (None for an installed package); `device`, the processor or the accelerators; `data`, sha256 of each file.
    """
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **installed(_PACKAGES),
        **checkout(Path(__file__).resolve().parents[2]),
        "device": device(),
        "data": {Path(file).name: file_digest(Path(file)) for file in data_files},
    }


def checkout(root: Path) -> dict[str, Any]:
    """`commit` and `dirty` (uncommitted changes, new files included) of the git checkout `root`, or None for both."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


def device() -> str:
    """The accelerators' names where their tool answers, else the processor's, and how many of them."""
    if tool := shutil.which("nvidia-smi"):
        asked = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        names = asked.stdout.split("\n")[:-1] if asked.returncode == 0 else []
        if names:
            return f"{len(names)} x {names[0]}"
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}"


def processor() -> str:
    """Its name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
