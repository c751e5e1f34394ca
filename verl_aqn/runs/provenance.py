"""The origin of a run: the commit, the machine, the data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl_aqn.checkpoints.checksums import FILE as CHECKSUMS
from verl_aqn.checkpoints.checksums import MODEL_FILES, file_digest, unchanged_digest
from verl_aqn.errors import EnvironmentFault

_PACKAGES = (
    "verl-aqn", "verl", "vllm", "ray", "torch", "transformers", "peft", "tensordict", "TransferQueue", "numpy",
    "math-verify",
)  # fmt: skip
_DEVICE_NAMES = (
    (("npu-smi", "info", "-m"), r"\bAscend.*?(?=\s*$)"),  # the last column; a card's controller (Mcu) is not a device
    (("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"), r"^.+$"),
)
CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder of the code: a checkout, or the folder that the package is installed in."""
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
        **checkout(CHECKOUT),
        "device": device(),
        "base": model_digest(Path(base)),
        "data": {name: file_digest(Path(file)) for name, file in zip(_names(data_files), data_files, strict=True)},
    }


def own_code(named: Mapping[str, str | None]) -> dict[str, str]:
    """Return the sha256 of the user's own files that a config names, by key; what these files import is not included.

    A name is a path or `pkg://MODULE`. Modules of verl-aqn are left out, because `commit` is on record for them; so is
    what does not exist, which the checks before a run report.
    """
    found = {}
    for key, name in named.items():
        path, _, module = (name or "").partition("pkg://")
        file = Path(path.removeprefix("file://")).expanduser()
        if (module := module.replace("/", ".")) and module.split(".")[0] != __name__.split(".")[0]:
            with suppress(ImportError, ValueError):  # not installed, or not a module with a file
                spec = importlib.util.find_spec(module)
                file = Path(spec.origin or "") if spec else file
        if file.is_file():
            found[key] = file_digest(file)
    return found


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

    `dirty`: there are uncommitted changes, including new files. Both are None if git is missing or refuses. Without a
    checkout, as in a container image, the commit is the one in VERL_AQN_COMMIT, which the image was built with.
    """
    if not (root / ".git").exists():
        return {"commit": os.environ.get("VERL_AQN_COMMIT") or None, "dirty": None}
    try:
        return _read(root)
    except EnvironmentFault:
        return {"commit": None, "dirty": None}


def checkout_fault(root: Path = CHECKOUT) -> str:
    """Return why git does not tell the commit of the checkout `root`, with the fix; "" if it does, or without one."""
    try:
        if (root / ".git").exists():
            _read(root)
    except EnvironmentFault as error:
        return str(error)
    return ""


def unknown_code(versions: Mapping[str, Any]) -> str:
    """Return why the code of a run is not known from its versions, or "" if the recorded commit is its code."""
    if not versions.get("commit"):
        return "no commit is on record"
    return "it has changes that are not committed" if versions.get("dirty") else ""


def _read(root: Path) -> dict[str, Any]:
    changes = _git(root, "status", "--porcelain", "--untracked-files=normal")  # also if the user's config hides these
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints about the checkout `root`. Raises EnvironmentFault if git is missing or refuses."""
    if shutil.which("git") is None:
        raise EnvironmentFault(f"{root} is a checkout, but git is not installed: install git")
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[0]
        own = f": git config --global --add safe.directory {root}" if "safe.directory" in done.stderr else ""
        raise EnvironmentFault(f"git refuses {root} ({reason}){own}")
    return done.stdout.strip()


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
