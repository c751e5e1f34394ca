"""SHA-256 of files: a model folder keeps those of its own files, so that damage is seen before the folder is used."""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from verl_aqn.cache import cache_dir
from verl_aqn.errors import ModelError

FILE = "verl_aqn_checksums.json"
"""In every model folder that this project writes: {"sha256": {file name: hex digest}} of all its other files."""
SETTLED_S = 5
"""How long a file must have been left alone before its digest is kept: file systems' clocks tick every 2 s at most."""
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


def known_digest(path: Path) -> str:
    """Return `file_digest`, which the cache keeps from run to run while nothing says that the file was changed.

    The file is read anew where its place, device, inode, size, time of writing or of change differ from those before
    and after it was read, and where it was changed within `SETTLED_S` of then: a second change within a tick of the
    file system's clock would not show. What changes bytes and no time (a fault of the disk) is not seen: folders that
    have digests of their own are held against these by `check_checksums`, which reads them.
    """
    path = path.resolve()
    kept = cache_dir() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    now = _identity(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(kept.read_text())
        if [record["path"], record["file"]] == [str(path), now] and _is_sha256(record["sha256"]):
            return record["sha256"]
    digest, read = unchanged_digest(path), time.time()
    if _identity(path) == now and max(now[-2:]) < (read - SETTLED_S) * 1e9:
        record = {"path": str(path), "file": now, "sha256": digest}
        with suppress(OSError):  # a cache that cannot be written is none
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_name(f".{secrets.token_hex(8)}")
            temporary.write_text(json.dumps(record) + "\n")
            temporary.replace(kept)
    return digest


def _identity(path: Path) -> list[int]:
    now = path.stat()
    return [now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


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
