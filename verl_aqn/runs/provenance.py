"""The origin of a run: the commit, the machine, the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl_aqn.checkpoints.checksums import FILE as CHECKSUMS
from verl_aqn.checkpoints.checksums import MODEL_FILES, file_digest, unchanged_digest

_PACKAGES = (
    "verl-aqn", "verl", "vllm", "ray", "torch", "transformers", "peft", "tensordict", "TransferQueue", "numpy",
    "math-verify",
)  # fmt: skip
_DEVICE_NAMES = (
    (("npu-smi", "info", "-m"), r"\bAscend.*?(?=\s*$)"),  # the last column; a card's controller (Mcu) is not a device
    (("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"), r"^.+$"),
)
_REPORTS = ("quantization.json", CHECKSUMS)  # our own reports about the folder


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def provenance(data_files: Sequence[str | Path], base: str | Path) -> dict[str, Any]:
    """Return everything that a result can depend on in addition to its config.

    `python`, `machine` and the installed packages' versions; `commit` and `dirty` of the checkout that verl-aqn runs
    from (None for an installed package outside an image); `device`, the processor or the accelerators; `base`, the
    `model_digest` of the folder of the base model; `data`, the sha256 of each file.
    """
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        **installed(_PACKAGES),
        **checkout(Path(__file__).resolve().parents[2]),
        "device": device(),
        "base": model_digest(Path(base)),
        "data": {name: file_digest(Path(file)) for name, file in zip(_names(data_files), data_files, strict=True)},
    }


def _names(files: Sequence[str | Path]) -> list[str]:
    """Name each file by the end of its path, as long as needed to make all names different."""
    parts = [Path(file).parts for file in files]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def checkout(root: Path) -> dict[str, Any]:
    """Return `commit` and `dirty` of the git checkout `root`, or None for both.

    `dirty`: there are uncommitted changes, including new files. Without a checkout, as in a container image, the commit
    is the one in VERL_AQN_COMMIT, which the image was built with.
    """
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {"commit": os.environ.get("VERL_AQN_COMMIT") or None, "dirty": None}

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return result.stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(git("status", "--porcelain"))}


def device() -> str:
    """Return the number and name of the accelerators if their tool reports them, otherwise of the processor's cores."""
    for command, pattern in _DEVICE_NAMES:
        if tool := shutil.which(command[0]):
            done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)
            if done.returncode == 0 and (names := re.findall(pattern, done.stdout, re.MULTILINE)):
                return f"{len(names)} x {names[0]}"
    return f"{len(os.sched_getaffinity(0))} cores of {processor()}"


def processor() -> str:
    """Return the processor's name, or its architecture if the system does not report a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


def model_digest(folder: Path) -> str:
    """Return the sha256 of names and contents of a model's weights, config, tokenizer and chat template.

    These files decide the model's responses. `quantization.json` and `verl_aqn_checksums.json`, our reports about a
    folder, are not included.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES and file.name not in _REPORTS)
    with ThreadPoolExecutor() as pool:  # hashing releases Python's global lock
        digests = pool.map(unchanged_digest, files)
        lines = [f"{file.name}\0{digest}\n" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
