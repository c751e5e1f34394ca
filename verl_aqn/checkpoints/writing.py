"""Writing of Hugging Face model folders: a stream of tensors goes to one file or shards; a folder appears complete."""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from verl_aqn.checkpoints.checksums import write_checksums
from verl_aqn.checkpoints.storage import DTYPE_NAMES, INDEX, SINGLE, Spec, companions
from verl_aqn.errors import EnvironmentFault, ModelError, is_full, reason, remedy

MAX_SHARD_BYTES = 5 * 10**9
_LOCK = ".lock"
_ROOM = 1 << 24  # bytes; a disk with less free space counts as full


def write_model(
    folder: Path,
    config: dict[str, Any],
    layout: dict[str, Spec],
    tensors: Iterable[tuple[str, Tensor]],
    source: Path,
    extra: dict[str, dict[str, Any]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill ``folder`` with ``config.json``, the safetensors of ``tensors``, and the companions of ``source``.

    ``extra`` maps names of further JSON files to their contents.

    ``layout`` lists all tensors in advance, so that each tensor can be written and freed as soon as it is made, in any
    order. A model larger than ``max_shard_bytes`` is written in shards with an index. A shard is larger than
    ``max_shard_bytes`` only if it holds a single tensor that is.
    """
    for name, value in {"config.json": config, **extra}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    for file in companions(source):
        shutil.copyfile(file, folder / file.name)

    shards = _shards(layout, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in layout.values())},
            "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in sorted(shard)},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    missing = set(layout)
    with contextlib.ExitStack() as stack:
        place: dict[str, tuple[BinaryIO, int]] = {}
        for file_name, shard in zip(names, shards, strict=True):
            stream: BinaryIO = stack.enter_context((folder / file_name).open("wb"))
            header, offsets = _header(shard)
            stream.write(header)
            place |= {name: (stream, offset) for name, offset in offsets.items()}
        for name, tensor in tensors:
            assert layout[name] == (tensor.dtype, tuple(tensor.shape)), name
            stream, offset = place[name]
            stream.seek(offset)
            stream.write(tensor_bytes(tensor))
            missing.remove(name)
    assert not missing, missing


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of the tensor's values in row-major order, as in a safetensors file."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Create a temporary folder beside ``target``; rename it to ``target`` if the block succeeds, else remove it.

    Folders that killed writers of the same target left behind are removed first. A writer holds a lock in its folder
    while it lives, on any host and in any container, so a free lock means that the writer is dead. All files, and a
    file with their digests (`verl_aqn.checkpoints.checksums`), are synced to disk before the folder is renamed.

    Raises:
        ModelError: ``target`` exists before the block, or at the end of the block.
        EnvironmentFault: the folder cannot be created, or the block cannot write to it (no permission, disk full).
    """
    check_free(target)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    # The folder is created and locked under a name that no writer cleans up, and only then gets the name that is
    # cleaned up if unlocked.
    unborn = temporary.with_suffix(".new")
    with contextlib.ExitStack() as stack:
        for path in (unborn, temporary):
            stack.callback(shutil.rmtree, path, ignore_errors=True)
        stack.enter_context(_naming_the_target(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            _remove_unless_locked(leftover)
        unborn.mkdir()
        lock = stack.enter_context((unborn / _LOCK).open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        unborn.rename(temporary)
        yield temporary
        (temporary / _LOCK).unlink()
        write_checksums(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        try:
            temporary.rename(target)
        except OSError as error:
            raise (_taken(target) if os.path.lexists(target) else error) from error
        _sync(target.parent)


def check_free(target: Path) -> None:
    """Check that nothing has the name of a folder that will be written. Raises ModelError."""
    if os.path.lexists(target):  # also a broken link
        raise _taken(target)


def _taken(target: Path) -> ModelError:
    return ModelError(f"{target} already exists: remove it or choose another folder")


@contextlib.contextmanager
def _naming_the_target(target: Path) -> Iterator[None]:
    """Convert an OSError from writing ``target`` to an EnvironmentFault; errors of other files are not converted."""
    try:
        yield
    except OSError as error:
        file = os.fsdecode(error.filename or "")
        beside = os.fspath(target.parent / f".{target.name}.")
        ours = file.startswith(beside) or (file and Path(file) in (target, *target.parents))
        if not ours and not (is_full(error) and not file):  # an error of a write to an open file does not name the file
            raise
        where = target if ours else _without_room(target)
        raise EnvironmentFault(
            f"cannot write {where} ({reason(error)}): {remedy(error) or 'choose another place'}"
        ) from error


def _without_room(target: Path) -> Path:
    """Return the path that has no space left: ``target``, unless only the folder of temporary files is full."""
    temporary = Path(tempfile.gettempdir())
    free, other = (shutil.disk_usage(folder).free for folder in (target.parent, temporary))
    return temporary if other < _ROOM <= free else target


def _sync(path: Path) -> None:
    """Sync a file's contents, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unless_locked(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError), (folder / _LOCK).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # the writer of this folder is alive
        shutil.rmtree(folder, ignore_errors=True)


def _shards(layout: dict[str, Spec], max_shard_bytes: int) -> list[dict[str, Spec]]:
    """Split ``layout``, in its order, into parts of at most ``max_shard_bytes`` or of one tensor."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in layout.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _header(shard: dict[str, Spec]) -> tuple[bytes, dict[str, int]]:
    """Return (the header bytes of a safetensors file of these tensors, the offset of each tensor in the file)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, offset = {}, 0
    # Wide dtypes first, so that every tensor is aligned to its own element.
    for name, spec in sorted(shard.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        offsets[name], end = offset, offset + spec.nbytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}
