"""SHA-256 of files: a model folder keeps those of its own files, so that damage is seen before the folder is used."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from verl_aqn.errors import ModelError

FILE = "verl_aqn_checksums.json"
"""In every model folder that this project writes: {"sha256": {file name: hex digest}} of all its other files."""
MODEL_FILES = {".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Endings of the files from which weights, config, tokenizer and chat template are read."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_digest(path: Path) -> str:
    """Return `file_digest`; a process reads a file again only after its inode, size or times have changed.

    A start asks several times about the same files of many GB: for the cache's key, for damage, for the record.
    """
    now = path.stat()
    return _digest_of(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@cache
def _digest_of(path: Path, *as_it_is: int) -> str:
    return file_digest(path)


def write_checksums(folder: Path) -> None:
    """Write the digests of all files of ``folder`` into it; subfolders do not belong to a model."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _of_folder(file))
    with ThreadPoolExecutor() as pool:
        digests = dict(zip((file.name for file in files), pool.map(file_digest, files), strict=True))
    (folder / FILE).write_text(json.dumps({"sha256": digests}, indent=1) + "\n")


def check_checksums(folder: Path, progress: Callable[[int, int, str], None] | None = None) -> bool:
    """Hold the files of ``folder`` against the digests in it. Returns False where the folder has none (an older one).

    ``progress(done, total, file)`` is called after each file.

    Raises:
        ModelError: a file is missing, has other bytes, or was added to those that a model is read from.
    """
    record = folder / FILE
    if not record.is_file():
        return False
    try:
        wanted = dict(json.loads(record.read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{record} cannot be read: {_remedy(folder)}") from error
    there = {file.name: file for file in folder.iterdir() if _of_folder(file)}
    found = {name for name, file in there.items() if file.suffix in MODEL_FILES}
    if missing := sorted(wanted.keys() - there.keys()):
        raise ModelError(f"{folder / missing[0]} is missing: {_remedy(folder)}")
    if added := sorted(found - wanted.keys()):
        raise ModelError(f"{folder / added[0]} was added after the folder was made: remove it, or {_remedy(folder)}")
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock alone
        digests = pool.map(lambda name: unchanged_digest(folder / name), wanted)
        for done, (name, digest) in enumerate(zip(wanted, digests, strict=True), start=1):
            if digest != wanted[name]:
                raise ModelError(
                    f"{folder / name} was changed or damaged after it was made (SHA-256 {digest[:16]}…, recorded "
                    f"{str(wanted[name])[:16]}…): {_remedy(folder)}"
                )
            if progress is not None:
                progress(done, len(wanted), name)
    return True


def _of_folder(file: Path) -> bool:
    return file.name != FILE and not file.name.startswith(".")


def _remedy(folder: Path) -> str:
    return f"delete {folder} and run again, which makes a cached folder anew"
