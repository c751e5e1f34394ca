"""The temporary folder of an attempt at a run: sockets and files of its processes, for this user only.

A record of the run names the folder, so that it can be removed if the attempt is killed. A record may be damaged,
copied or made by others. So a folder is deleted only if a file in it says that it belongs to this run, and if no living
attempt holds its lock.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from verl_aqn.errors import EnvironmentFault
from verl_aqn.safe_files import is_own_folder, open_own

ROOT = Path("/tmp")  # short, because paths of sockets have at most 107 characters
PREFIX = "aqn-"
_OF = "run"  # file in the folder that names its run; locked while the attempt lives


def make(run: Path) -> tuple[str, int]:
    """Create a folder for an attempt at the run in `run`. Return the folder and the handle that holds its lock."""
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=ROOT)
    claim(Path(folder), run)
    handle = open_own(Path(folder) / _OF, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, handle


def claim(folder: Path, run: Path) -> None:
    """Create a folder whose name is already known, as on the other nodes of a cluster.

    Several processes may call this for the same folder.

    Raises:
        EnvironmentFault: another user made the folder first.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_own_folder(folder, 0o700):
        raise EnvironmentFault(
            f"{folder} was created by another user, who could read this run's files: start the run again"
        )
    with suppress(FileExistsError):
        handle = open_own(folder / _OF, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(handle, os.path.realpath(run).encode())
        os.close(handle)


def remove(folder: Path, run: Path) -> bool:
    """Delete a folder of an attempt at `run` if no living attempt holds it. Return whether it was deleted."""
    if folder.parent != ROOT or not folder.name.startswith(PREFIX) or not is_own_folder(folder, 0o700):
        return False
    try:
        handle = open_own(folder / _OF, os.O_RDONLY)
    except (EnvironmentFault, OSError):
        return False
    try:
        if os.read(handle, 1 << 16) != os.path.realpath(run).encode():
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
