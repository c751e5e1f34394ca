"""Carry out the steps of the Dockerfiles in scripts/containers without a container tool or an image registry.

    python -m tests.helpers.image_steps [cpu] [cuda] [npu] [--json]      as root on Debian, with debootstrap

Each image gets a clean root (`tests.helpers.clean_root`): the Debian of python:3.11-slim-bookworm. The committed files
of HEAD are copied into it. The images of vLLM and vllm-ascend cannot be fetched without a registry; the same root
stands in for them, with empty packages in place of the large ones that they hold. The exit code is 1 if a step fails.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.helpers.clean_root import INSIDE, Root, in_namespace, make_debian, temporary_folder
from tests.helpers.dockerfiles import Step, steps

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("cpu", "cuda", "npu")
STEP_S = 1800
RELEASE = "bookworm"
_OF_THE_IMAGE = {"cuda": ("torch", "vllm"), "npu": ("torch", "torch_npu", "vllm", "vllm-ascend")}
_ALSO = {"cuda": ["git", "g++"], "npu": ["git", "g++"]}  # Debian packages that these base images have, too
_START = ["verl-aqn", "--help"]


@dataclass(frozen=True)
class Row:
    """What became of one step. `result`: ran, in part, not run, or failed."""

    image: str
    line: int
    step: str
    user: str
    result: str
    seconds: float
    note: str = ""


def pinned(lock: str, names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions that a lock file gives to these packages."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "scripts" / lock).read_text().splitlines()]
    versions = dict(line.split("==") for line in lines if "==" in line and ";" not in line)
    return {name: versions[name] for name in names}


def carry_out(image: str, root: Root, context: Path) -> Iterator[Row]:
    """Carry out the steps of an image in order. A failed step is the last."""
    held = pinned(f"requirements-{image}.lock", _OF_THE_IMAGE[image]) if image in _OF_THE_IMAGE else {}
    for step in steps((context / f"scripts/containers/Dockerfile.{image}").read_text()):
        began = time.monotonic()
        result, note = _do(step, root, context, held)
        text = f"--chown={step.owner} {step.text}" if step.owner else step.text
        text = text if len(text) <= 70 else f"{text[:67]}..."
        yield Row(image, step.line, f"{step.name} {text}", step.user, result, round(time.monotonic() - began, 1), note)
        if result == "failed":
            return


def _do(step: Step, root: Root, context: Path, held: dict[str, str]) -> tuple[str, str]:
    """Carry out one step and return its result and a note. `held`: packages of the base image that are empty here."""
    if step.name == "FROM":
        root.stand_in(held)
        told = f" and empty {', '.join(f'{name} {version}' for name, version in held.items())}" if held else ""
        return "in part", f"the image cannot be had: Debian {RELEASE}, its Python{told} stand in"
    if step.name == "WORKDIR":
        # Docker's older builder and some others make the folder as root, whoever the user is.
        (root.path / step.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif step.name == "COPY":
        _copy(step, root, context)
    elif step.name == "RUN":
        return _judge(step, root, ["/bin/sh", "-c", step.text], held)
    elif step.name == "START":
        if held:
            result, note = _judge(step, root, _START, held)
            reason = f"needs a device and the image's {', '.join(held)}"
            return ("in part" if result == "ran" else result), note or f"it {reason}; {shlex.join(_START)} ran"
        return _judge(step, root, list(step.command), held)
    return "ran", ""


def _judge(step: Step, root: Root, command: list[str], held: dict[str, str]) -> tuple[str, str]:
    done = root.run(command, step.user, step.folder, dict(step.environment), STEP_S)
    print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode:
        last = [line for line in done.stdout.splitlines() if line.strip()][-3:]
        return "failed", f"exit code {done.returncode}: {' | '.join(last)}"
    if held and (now := root.installed(list(held))) != held:
        return "failed", f"the base image's packages were replaced: {now}"
    if held and "pip" in step.text:
        return "in part", f"{', '.join(held)} are empty here; pip left them as they were and installed the rest"
    return "ran", ""


def _copy(step: Step, root: Root, context: Path) -> None:
    """Copy files as Docker does: owned by root or by --chown. A folder that exists keeps its owner."""
    *sources, target = shlex.split(step.text)
    user, _, group = step.owner.partition(":")
    uid, groups, _ = root.identity(user or "root")
    gid = root.group(group) if group else groups[0]
    there = root.path / os.path.join(step.folder, target).lstrip("/")
    for name in sources:
        source = context / name
        folder = there if source.is_dir() or target.endswith(("/", ".")) else there.parent
        folder.mkdir(parents=True, exist_ok=True)
        entries = sorted(source.iterdir()) if source.is_dir() else [source]
        for entry in entries:
            to = folder / entry.name if source.is_dir() or folder == there else there
            subprocess.run(["cp", "-a", "--no-preserve=ownership", str(entry), str(to)], check=True)
            subprocess.run(["chown", "-hR", f"{uid}:{gid}", str(to)], check=True)


def _inside(images: list[str]) -> None:
    """Print a row in JSON for each step. This runs in the namespace."""
    folder = Path(os.environ[INSIDE])
    context = folder / "context"
    context.mkdir()
    archive = folder / "context.tar"
    command = ["git", "-C", str(ROOT), "-c", "tar.umask=0022", "archive", "--output", str(archive), "HEAD"]
    subprocess.run(command, check=True)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(context)], check=True)
    made = folder / "debian"
    make_debian(made, RELEASE)
    for image in images:
        path = folder / image
        subprocess.run(["cp", "-a", str(made), str(path)], check=True)
        root = Root(path)
        if packages := _ALSO.get(image):
            install = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(packages)}"
            path_of = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
            done = root.run(["sh", "-c", install], "root", "/", path_of, STEP_S)
            assert done.returncode == 0, done.stdout
        for row in carry_out(image, root, context):
            print(json.dumps(asdict(row)), flush=True)


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| image | line | step | user | result | s | note |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row.image, str(row.line or ""), f"`{row.step}`", row.user, row.result, f"{row.seconds:.0f}", row.note]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Carry out the steps of the images, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="image", help=f"some of {', '.join(IMAGES)}; without any: all")
    parser.add_argument("--json", action="store_true", help="print a list of rows in JSON")
    given = parser.parse_args(arguments)
    images = given.images or list(IMAGES)
    if wrong := set(images) - set(IMAGES):
        parser.error(f"{', '.join(sorted(wrong))}: use some of {', '.join(IMAGES)}")
    if INSIDE in os.environ:
        _inside(images)
        return 0
    for tool in ("debootstrap", "unshare", "apt-get"):
        if os.geteuid() or not shutil.which(tool):
            print(f"error: {tool} is needed, and root: use Debian, and apt-get install debootstrap", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    with temporary_folder() as folder:
        process = in_namespace(folder, __spec__.name, *images)
        try:
            rows = [Row(**json.loads(line)) for line in process.stdout]
            ended = process.wait()
        finally:
            process.kill()
            process.wait()
    print(json.dumps([asdict(row) for row in rows], indent=1) if given.json else table(rows))
    whole = {row.image for row in rows if row.step.startswith("START")} == set(images)
    return int(bool(ended) or not whole or any(row.result == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
