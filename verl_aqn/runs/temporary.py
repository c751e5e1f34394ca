"""The temporary folder of an attempt at a run: sockets and files of its processes, for this user alone.

A record of a run names it, so that what a killed attempt left can be removed. A record may be damaged, copied or made
by others: only a folder that says itself that it is this run's, and that no living attempt holds, is ever deleted.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from verl_aqn.errors import EnvironmentFault
from verl_aqn.safe_files import is_own_folder, open_own

ROOT = Path("/tmp")  # short: the paths of sockets end at 107 characters
PREFIX = "aqn-"
_OF = "run"  # the file in it that says whose it is, locked while the attempt lives


def make(run: Path) -> tuple[str, int]:
    """A new folder for an attempt at the run in the folder `run`, and the handle that holds its lock."""
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=ROOT)
    claim(Path(folder), run)
    handle = open_own(Path(folder) / _OF, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return folder, handle


def claim(folder: Path, run: Path) -> None:
    """Make a folder whose name is known already, as on the other nodes of a cluster; several processes may.

    Raises:
        EnvironmentFault: another user made it first.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_own_folder(folder, 0o700):
        raise EnvironmentFault(f"{folder} was made by another user, who may want this run's files: start the run again")
    with suppress(FileExistsError):
        handle = open_own(folder / _OF, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(handle, os.path.realpath(run).encode())
        os.close(handle)


def remove(folder: Path, run: Path) -> bool:
    """Delete a folder that an attempt at `run` made and that no living one holds. Whether it did."""
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
