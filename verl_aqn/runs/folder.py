"""One folder a run: nothing is overwritten, a dead run is resumed, two runs never share a folder.

base/runs/20260131-120000-3fa2b1/   state.json, lock, metrics.jsonl, evidence.jsonl, training.log, checkpoints/
base/training.log, base/checkpoints -> those of the newest run (symbolic links)
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from verl_aqn.errors import AqnError, BusyError, DataError, EnvironmentFault
from verl_aqn.runs.chain import linked
from verl_aqn.runs.old_names import current_names
from verl_aqn.safe_files import open_own, own_entries, own_folder

STATUSES = ("running", "finished", "failed", "interrupted")
LINKS = ("training.log", "checkpoints")
EVIDENCE = "evidence.jsonl"


class RunFolder:
    """A run's folder. `open_run` makes one and holds its lock; `RunFolder(path)` reads or appends without it,
    which is what the other processes of a run do.

    `resumed`: an earlier attempt is carried on. `note`: what a user should know about the choice, or "".
    """

    def __init__(self, path: Path, *, lock: int | None = None, resumed: bool = False, note: str = "") -> None:
        self.path = Path(path)
        self.resumed = resumed
        self.note = note
        self._lock = lock

    def __reduce__(self) -> tuple[type[RunFolder], tuple[Path]]:
        return RunFolder, (self.path,)  # a lock does not travel: its handle means nothing in another process

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def log(self) -> Path:
        return self.path / "training.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def state(self) -> dict[str, Any]:
        """state.json: status, attempt, pid, created, started, updated (UTC, ISO 8601), config_digest, message."""
        state = self._parsed("state.json")
        if lacking := [key for key in ("status", "created", "config_digest") if not isinstance(state.get(key), str)]:
            raise self._damage("state.json", f"no {', '.join(lacking)}")
        return state

    @property
    def locked(self) -> bool:
        """Whether some process, this one included, is running this run. A copy without its lock is nobody's."""
        if not (self.path / "lock").exists():
            return False
        with _faults(self.path):
            handle = _try_lock(self.path / "lock", exclusive=False)
        if handle is not None:
            os.close(handle)
        return handle is None

    def set_status(self, status: str, message: str = "") -> None:
        """Writes state.json: after a crash it holds the old status or the new one, never half of either."""
        if status not in STATUSES:
            raise ValueError(f"run status {status!r} is not one of {', '.join(STATUSES)}")
        _write_state(self.path, self.state | {"status": status, "message": message, "updated": _now()})

    def write_text(self, name: str, text: str) -> None:
        """Writes a file once, whole or not at all. The same text again is fine; other text is a DataError."""
        path = self.path / name
        with _faults(path):
            if path.exists():
                if path.read_text() != text:
                    raise DataError(f"{path} exists with other content: it is not overwritten; use a new run")
                return
            _write_whole(path, text)

    def replace_text(self, name: str, text: str) -> None:
        """Writes a file anew, whole or not at all."""
        _write_whole(self.path / name, text)

    def block(self, name: str) -> dict[str, Any] | None:
        """The keys and values in a JSON or YAML file, None where there is no such file. DataError: it is damaged."""
        return self._parsed(name) if (self.path / name).exists() else None

    def _parsed(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            with _faults(path):
                text = path.read_text()
            found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(current_names(text))
        except (ValueError, yaml.YAMLError) as error:
            raise self._damage(name, " ".join(str(error).split())) from error
        if not isinstance(found, dict):
            raise self._damage(name, "no keys and values")
        return found

    def _damage(self, name: str, what: str) -> DataError:
        return DataError(f"{self.path / name} is damaged ({what}): move {self.path} away and start again")

    def add_evidence(self, *records: Mapping[str, Any]) -> None:
        """Appends records to evidence.jsonl, each linked to the one before it (`verl_aqn.runs.chain`)."""
        self.append(EVIDENCE, *records, link=True)

    def append(self, name: str, *records: Mapping[str, Any], link: bool = False) -> None:
        """Adds a line of JSON for each record, all in one write.

        Writers in several processes take turns, and what a killed one left half is removed: of several lines the whole
        ones stay. numpy and torch scalars become numbers; NaN and infinities, which JSON does not have, become null. A
        full disk is an EnvironmentFault.
        """
        texts = [_text(record) for record in records]
        path = self.path / name
        with _faults(path):
            handle = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # The kernel stops the write of a killed process between pages: a long line is then torn, and the next
                # one would be glued to it.
                _cut_torn_line(handle)
                if link:
                    texts = _linked(_last_line(handle), texts)
                _write_all(handle, "".join(f"{text}\n" for text in texts).encode())
            finally:
                # Not left to close(): a process forked in between holds the file open, and with it the lock.
                fcntl.flock(handle, fcntl.LOCK_UN)
                os.close(handle)

    def read(self, name: str) -> Iterator[dict[str, Any]]:
        """Records of `name` in order, none if there is no such file.

        A last line without its end is left out: its writer was killed, or is still at it. Damage elsewhere is a
        DataError.
        """
        path = self.path / name
        if not path.exists():
            return
        with _faults(path), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path} line {number} is damaged ({error}): remove that line") from error
                if not isinstance(record, dict):
                    raise DataError(f"{path} line {number} is damaged (no keys and values): remove that line")
                yield record

    def by_step(self, name: str, kind: str) -> dict[int, dict[str, Any]]:
        """Records of one kind by step, ascending. A resumed run takes some steps again: the later record counts."""
        found = {
            int(record["step"]): record
            for record in self.read(name)
            if record.get("kind") == kind and isinstance(record.get("step"), int)
        }
        return dict(sorted(found.items()))

    def close(self) -> None:
        """Lets go of the lock. The kernel does the same when the process ends, however it ends."""
        if self._lock in _held:
            _held.remove(self._lock)
            os.close(self._lock)
            self._lock = None


def open_run(base: Path, config: dict[str, Any], *, fresh: bool = False) -> RunFolder:
    """The folder for a run of `config` (plain values) under `base`, locked for the life of this process.

    The newest run under `base` decides: finished -> a new run; dead with the same config -> it is resumed
    (attempt + 1); dead with another config -> a new run, and `note` says so; alive -> BusyError, also with `fresh`,
    which otherwise always gives a new run.

    Raises DataError where base/training.log or base/checkpoints is no link of ours, EnvironmentFault where `base`
    cannot be written, or `base` or what is in it may be another user's (`verl_aqn.safe_files`).
    """
    # Its processes, those of other nodes too, have working directories of their own.
    base, digest = Path(base).absolute(), _digest(config)
    with _faults(base):
        own_folder(base)
        own_folder(base / "runs")
        for name in LINKS:
            if os.path.lexists(base / name) and not (base / name).is_symlink():
                raise DataError(f"{base / name} is not a link to a run, and is not overwritten: move it away")
        with _opening(base):
            note = ""
            newest = _newest(base)
            if newest is not None:
                own_folder(newest.path)
                lock = _try_lock(newest.path / "lock")
                if lock is None:
                    raise BusyError(
                        f"a run is in progress in {newest.path} (pid {newest.state['pid']}): wait for it, stop it, "
                        "or use another folder"
                    )
                with ExitStack() as release:
                    release.callback(os.close, lock)
                    # Read under the lock: until then the run may still be finishing.
                    state = newest.state
                    died = state["status"] != "finished"
                    if died and not fresh and state["config_digest"] == digest:
                        own_entries(newest.path)
                        run = _resume(newest, state, lock)
                        release.pop_all()
                        return run
                if died and not fresh:
                    note = f"{newest.path.name} did not finish but had another config: a new run was started"
            return _create(base, digest, note)


def runs_of(base: Path, config: dict[str, Any]) -> list[RunFolder]:
    """The runs of `config` (as `open_run` takes it) under `base`, the newest last."""
    digest = _digest(config)
    return sorted(
        (run for run in _runs(base) if run.state["config_digest"] == digest), key=lambda run: run.state["created"]
    )


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _create(base: Path, digest: str, note: str) -> RunFolder:
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    # Filled under another name and then renamed: a run folder is complete from the moment it can be seen.
    path = base / "runs" / f".new-{name}"
    path.mkdir(0o755)
    (path / "checkpoints").mkdir(0o755)
    (path / "training.log").touch(0o644)
    lock = _try_lock(path / "lock")
    now = _now()
    state = {"status": "running", "attempt": 1, "pid": os.getpid(), "created": now, "started": now, "updated": now}
    _write_state(path, state | {"config_digest": digest, "message": ""})
    final = base / "runs" / name
    path.rename(final)
    for link in LINKS:
        temporary = base / f".{link}-{name}"
        temporary.symlink_to(Path("runs") / name / link)
        temporary.replace(base / link)
    return _hold(RunFolder(final, lock=lock, note=note))


def _resume(run: RunFolder, state: dict[str, Any], lock: int | None) -> RunFolder:
    for path in run.path.glob("*.jsonl"):
        with path.open("rb+") as file:
            _cut_torn_line(file.fileno())
    attempt = state["attempt"] + 1
    now = _now()
    news = {"status": "running", "attempt": attempt, "pid": os.getpid(), "started": now, "updated": now, "message": ""}
    _write_state(run.path, state | news)
    how = "ended without a word" if state["status"] == "running" else state["status"]
    note = f"attempt {attempt} of {run.path.name}: the one before {how}"
    return _hold(RunFolder(run.path, lock=lock, resumed=True, note=note))


def _newest(base: Path) -> RunFolder | None:
    """By creation time, not by name: two runs made within one second differ only in their random part."""
    return max(_runs(base), key=lambda run: run.state["created"], default=None)


def _runs(base: Path) -> list[RunFolder]:
    return [RunFolder(path) for path in (base / "runs").glob("[!.]*") if path.is_dir()]


def _text(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, default=lambda scalar: scalar.item(), allow_nan=False)
    except ValueError:
        plain = json.loads(json.dumps(record, default=lambda scalar: scalar.item()), parse_constant=lambda _: None)
        return json.dumps(plain)


def _linked(before: bytes, texts: Iterable[str]) -> list[str]:
    """The records with their links. `before`: the line that the first of them follows."""
    lines = []
    for text in texts:
        lines.append(json.dumps(linked(before, json.loads(text))))
        before = lines[-1].encode()
    return lines


def _write_all(handle: int, data: bytes) -> None:
    if os.write(handle, data) < len(data):  # a disk that fills up within it; Linux writes up to 2 GB at once
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_torn_line(handle: int) -> None:
    """Removes what a killed writer left behind the last line end, before the next record is glued to it."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.ftruncate(handle, os.pread(handle, size, 0).rfind(b"\n") + 1)


def _last_line(handle: int) -> bytes:
    """The last line without its end; empty where there is none."""
    size = os.fstat(handle).st_size
    start, tail = size, b""
    while start > 0 and tail.count(b"\n") < 2:
        step = min(start, 1 << 16)
        start -= step
        tail = os.pread(handle, step, start) + tail
    return tail.removesuffix(b"\n").rpartition(b"\n")[2]


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    _write_whole(folder / "state.json", json.dumps(state, indent=2))


def _write_whole(path: Path, text: str) -> None:
    """After a crash or on a full disk the file is what it was before, or all of `text`."""
    temporary = path.parent / f".{path.stem}-{secrets.token_hex(6)}"
    with _faults(path):
        with open(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


# ---------------------------------------------------------------- locks

_held: set[int] = set()


def _close_in_child() -> None:
    """A forked child (a data loader's worker) shares its parent's flock and would keep it after the parent's death."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _hold(run: RunFolder) -> RunFolder:
    if run._lock is not None:
        _held.add(run._lock)
    return run


def _try_lock(path: Path, *, exclusive: bool = True) -> int | None:
    """A handle that holds the flock of `path`, or None if another one does. The kernel frees it on kill -9.

    Not exclusive: only to look; the file may then be read-only, and has to exist.
    """
    handle = open_own(path, os.O_RDWR | os.O_CREAT) if exclusive else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


@contextmanager
def _opening(base: Path) -> Iterator[None]:
    """One process at a time chooses a run, or two would both find the last one finished and start."""
    deadline = time.monotonic() + 30
    while (handle := _try_lock(base / "runs" / ".opening")) is None:
        if time.monotonic() > deadline:
            raise AqnError(f"another process has been opening a run in {base} for 30 s: stop it")
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turns the system's errors about `path` into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFault(f"the disk is full at {path}: free some space, then start the run again") from error
        raise EnvironmentFault(f"cannot use {path} ({error.strerror}): choose another aqn.run.dir") from error
