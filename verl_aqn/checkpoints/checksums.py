"""SHA-256 digests of files. A model folder stores the digests of its files, so that damage is found before use."""

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
"""File in every model folder that this project writes: {"sha256": {file name: hex digest}} of all other files."""
SETTLED_S = 5
"""Seconds that a file must be unchanged before its digest is cached: file times have a resolution of 2 s or better."""
MODEL_FILES = {".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Suffixes of the files from which weights, config, tokenizer and chat template are read."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_digest(path: Path) -> str:
    """Return `file_digest`, and read the file again in this process only if its inode, size or times have changed.

    At its start a run needs the digests of the same large files several times: for the key of the cache, for the check
    of damage and for the run record.
    """
    now = path.stat()
    return _digest_of(path, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@cache
def _digest_of(path: Path, *as_it_is: int) -> str:
    return file_digest(path)


def known_digest(path: Path) -> str:
    """Return `file_digest`, which is cached from run to run as long as the file looks unchanged.

    The file is read again if its path, device, inode, size, mtime or ctime differ from the cached ones. A digest is
    not cached if the file changed while it was read or within `SETTLED_S` before: a second change within the
    resolution of the file times would not be seen. A change of bytes that leaves all times as they are (a fault of the
    disk) is not seen either; `check_checksums` reads the files and finds it in folders that store their own digests.
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
        with suppress(OSError):  # without a writable cache the digest is computed each time
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
    """Write the digests of all files of ``folder`` into it. Subfolders are skipped: they are not part of a model."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _of_folder(file))
    with ThreadPoolExecutor() as pool:
        digests = dict(zip((file.name for file in files), pool.map(file_digest, files), strict=True))
    (folder / FILE).write_text(json.dumps({"sha256": digests}, indent=1) + "\n")


def check_checksums(folder: Path, progress: Callable[[int, int, str], None] | None = None) -> bool:
    """Compare the files of ``folder`` with the digests stored in it.

    ``progress(done, total, file)`` is called after each file.

    Returns:
        False if the folder stores no digests (it was made by an older version), else True.

    Raises:
        ModelError: a file is missing or has other bytes, or a file from which a model is read was added.
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
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
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
    return f"delete {folder} and run again; a cached folder is then made again"
