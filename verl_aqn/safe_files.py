"""Folders and files that no other user on this machine has planted or can change.

In /tmp anybody can create a name first. A folder or link that another user planted would show them what a run writes,
make the run overwrite the user's own files, or make it read their config, which names code to run.
"""

import grp
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from verl_aqn.errors import EnvironmentFault

_ALL_MAY_WRITE = stat.S_IWOTH
_MOST_LINKS = 40  # the kernel's limit
_NOBODY = 65534  # owner, inside a user namespace, of files of any user outside it
_PATH_ONLY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def own_folder(path: Path, instead: str = "aqn.run.dir=DIR", *, make: bool = True, or_roots: bool = False) -> None:
    """Check that the folder `path` belongs to this user; create it and its parents if they do not exist.

    The folder must not be a link, and only this user may write to it. No parent folder may let everybody rename its
    entries. If everybody may write to a parent (/tmp), the next folder must belong to this user or root. Each folder is
    opened from its parent, so that none can be exchanged in between.

    Args:
        instead: how the user names another folder, for the message.
        make: False only checks what exists.
        or_roots: a folder of root is accepted, too: enough to read from.

    Raises:
        EnvironmentFault: which folder or link is not safe, and what to do. OSError: the system's own refusal.
    """
    path = Path(path).absolute()
    todo, here, links = list(path.parts[1:]), Path("/"), 0
    handle = os.open("/", _PATH_ONLY | os.O_DIRECTORY)
    try:
        while todo:
            name, above = todo.pop(0), os.fstat(handle)
            try:
                found = _open_or_make(name, handle, make)
            except FileNotFoundError:
                if make:
                    raise
                return
            try:
                status, shown = os.fstat(found), Path(os.path.normpath(here / name))
                reason = _unsafe(status, above, on_the_way=bool(todo))
                if reason := reason or ("" if todo else _not_own(status, or_roots)):
                    raise EnvironmentFault(f"{shown} {reason}: choose another folder ({instead})")
                if stat.S_ISLNK(status.st_mode):
                    if (links := links + 1) > _MOST_LINKS:
                        raise EnvironmentFault(
                            f"{shown} leads through too many links: give its target instead ({instead})"
                        )
                    target = Path(os.readlink("", dir_fd=found))
                    if target.is_absolute():
                        os.close(handle)
                        handle, here = os.open("/", _PATH_ONLY | os.O_DIRECTORY), Path("/")
                    todo = [*target.relative_to(target.anchor).parts, *todo]
                else:
                    handle, found, here = found, handle, shown
            finally:
                os.close(found)
    finally:
        os.close(handle)


def _open_or_make(name: str, above: int, make: bool) -> int:
    """Open the entry `name` of the folder `above`, and create it as a folder if needed. Links are not followed."""
    try:
        return os.open(name, _PATH_ONLY, dir_fd=above)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another process was faster; the owner is checked as for any other folder
        os.mkdir(name, 0o755, dir_fd=above)
    return os.open(name, _PATH_ONLY, dir_fd=above)


def _unsafe(status: os.stat_result, above: os.stat_result, *, on_the_way: bool) -> str:
    """Return why an entry of the folder `above` cannot be trusted, or "".

    `on_the_way`: the entry is a parent of the requested folder.
    """
    free_for_all = above.st_mode & _ALL_MAY_WRITE and above.st_mode & stat.S_ISVTX
    trusted = {os.geteuid(), 0, above.st_uid} - {_NOBODY}
    if free_for_all and status.st_uid not in trusted:
        return f"belongs to {owner(status)}, who created it in a folder that everybody may write to"
    if stat.S_ISLNK(status.st_mode):
        return "" if on_the_way else "is a link, and links are not followed"
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if on_the_way and status.st_mode & _ALL_MAY_WRITE and not status.st_mode & stat.S_ISVTX:
        return "lets everybody rename its entries (fix: chmod o-w or chmod +t)"
    return ""


def _not_own(status: os.stat_result, or_roots: bool) -> str:
    """Return why a folder does not belong to this user alone, or ""."""
    if not _is_mine(status) and not (or_roots and status.st_uid == 0):
        return f"belongs to {owner(status)}, not to {_name(os.geteuid())}"
    return "is writable by others (check its content, then chmod go-w)" if _others_write(status) else ""


def _is_mine(status: os.stat_result) -> bool:
    """Return whether a file belongs to this user. Network disks may show root's files as nobody's (root_squash)."""
    user = os.geteuid()
    return status.st_uid == user or (user == 0 and status.st_uid == _NOBODY and _is_of_network(status.st_dev))


def _is_of_network(device: int) -> bool:
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return any(mount[2] == number and mount[mount.index("-") + 1].startswith("nfs") for mount in mounts)


def _others_write(status: os.stat_result) -> bool:
    in_group = bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)
    return bool(status.st_mode & _ALL_MAY_WRITE) or in_group


def own_entries(folder: Path) -> None:
    """Check that the entries of an own folder belong to this user, are no links, and are not writable by others.

    Raises:
        EnvironmentFault: which entry is not safe.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                raise EnvironmentFault(f"{entry.path} is a link, and links are not followed: move it away")
            if not _is_mine(status):
                raise EnvironmentFault(f"{entry.path} belongs to {owner(status)}: move {folder} away and start again")
            if _others_write(status):
                raise EnvironmentFault(f"{entry.path} is writable by others: check its content, then chmod go-w")


def keep_to_oneself() -> None:
    """Set the umask so that this process and its children create nothing that other users can write to."""
    os.umask(os.umask(0o022) | 0o022)


def is_own_folder(path: Path, mode: int = 0o755) -> bool:
    """Return whether `path` is a folder of this user, not a link, with permissions within `mode`."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    permissions = stat.S_IMODE(status.st_mode)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not permissions & ~mode


def open_own(path: Path, flags: int) -> int:
    """Open a file in an own folder like `os.open`, without following a link and without waiting at a pipe.

    Raises:
        EnvironmentFault: a link, a pipe or device, or another user's file. OSError: the system's own refusal.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if os.path.islink(path):
            raise EnvironmentFault(f"{path} is a link, and links are not followed: move it away") from error
        raise
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and _is_mine(status):
        return handle
    os.close(handle)
    what = "is not a regular file" if not stat.S_ISREG(status.st_mode) else f"belongs to {owner(status)}"
    raise EnvironmentFault(f"{path} {what}: move it away")


def owner(status: os.stat_result) -> str:
    """Return the name of the user that a file belongs to."""
    return _name(status.st_uid)


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _is_own_group(group: int) -> bool:
    """Return whether a group contains this user only.

    Many systems create such a group for each user (whose umask is then 002).
    """
    try:
        known = grp.getgrgid(group)
    except KeyError:
        return False
    mine = _name(os.geteuid())
    return known.gr_name == mine and set(known.gr_mem) <= {mine}
