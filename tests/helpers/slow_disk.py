"""A disk that shows a folder slowly, like a network disk: `python -m tests.helpers.slow_disk FOLDER PLACE [options]`.

FUSE passes each operation on to FOLDER after `--delay` seconds. A file that was made through another such disk is seen
only `--late` seconds after it was first looked for, as NFS keeps the answer that there is no such file. A lock is known
only to the processes that use this PLACE.
"""

import argparse
import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mfusepy

_STATUS = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime_ns", "st_mtime_ns", "st_ctime_ns")
_OPERATIONS = (
    "getattr",
    "readdir",
    "open",
    "create",
    "read",
    "write",
    "truncate",
    "fsync",
    "unlink",
    "rename",
    "mkdir",
)


class SlowDisk(mfusepy.Operations):
    """The operations on the files of `folder`, each later than on the folder itself."""

    use_ns = True

    def __init__(self, folder: Path, delay: float, late: float):
        self.folder, self.delay, self.late = folder, delay, late
        self.asked: dict[int, float] = {}
        self.own = {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
        self.guard = threading.Lock()

        for name in _OPERATIONS:
            setattr(self, name, self._later(getattr(self, name)))

    def _later(self, operation: Callable) -> Callable:
        def later(*arguments: Any) -> Any:
            time.sleep(self.delay)
            return operation(*arguments)

        return later

    def _at(self, path: str) -> str:
        return f"{self.folder}{path}"

    def _seen(self, path: str) -> os.stat_result:
        status = os.lstat(self._at(path))
        with self.guard:
            if not stat.S_ISREG(status.st_mode) or status.st_ino in self.own:
                return status
            first = self.asked.setdefault(status.st_ino, time.monotonic())
        if time.monotonic() < first + self.late:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return status

    def getattr(self, path: str, handle: int | None = None) -> dict[str, Any]:
        status = os.fstat(handle) if handle else self._seen(path)
        return {name.removesuffix("_ns"): getattr(status, name) for name in _STATUS}

    def readdir(self, path: str, handle: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    def open(self, path: str, flags: int) -> int:
        self._seen(path)
        return os.open(self._at(path), flags & ~os.O_NOFOLLOW)

    def create(self, path: str, mode: int, info: Any = None) -> int:
        handle = os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
        with self.guard:
            self.own.add(os.fstat(handle).st_ino)
        return handle

    def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
        return os.pread(handle, size, offset)

    def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
        return os.pwrite(handle, data, offset)

    def truncate(self, path: str, length: int, handle: int | None = None) -> int:
        os.truncate(self._at(path) if handle is None else handle, length)
        return 0

    def fsync(self, path: str, only_data: int, handle: int) -> int:
        os.fsync(handle)
        return 0

    def release(self, path: str, handle: int) -> int:
        os.close(handle)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._at(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._at(path))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._at(path))
        return 0

    def symlink(self, target: str, source: str) -> int:
        os.symlink(source, self._at(target))
        return 0

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def rename(self, old: str, new: str) -> int:
        os.rename(self._at(old), self._at(new))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._at(path), mode)
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        os.utime(self._at(path))
        return 0


def main() -> None:
    """Mount the disk and serve it until it is unmounted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("place", type=Path)
    for name in ("delay", "late"):
        parser.add_argument(f"--{name}", type=float, default=0, metavar="SECONDS")
    given = parser.parse_args()
    disk = SlowDisk(given.folder, given.delay, given.late)
    mfusepy.FUSE(disk, str(given.place), foreground=True, default_permissions=True, allow_other=True)


if __name__ == "__main__":
    main()
