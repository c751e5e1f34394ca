"""One folder per run: nothing is overwritten, a run that stopped is resumed, and two runs never share a folder.

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
from verl_aqn.runs.old_names import current_fields, current_names, rename_settings
from verl_aqn.safe_files import open_own, own_entries, own_folder

STATUSES = ("running", "finished", "failed", "interrupted")
LINKS = ("training.log", "checkpoints")
EVIDENCE = "evidence.jsonl"


class RunFolder:
    """The folder of a run.

    `open_run` makes a folder and holds its lock; `RunFolder(path)` reads or appends without the lock, as the other
    processes of a run do. `resumed`: an earlier attempt is continued. `note`: what a user should know about the choice
    of the folder, or "".
    """

    def __init__(self, path: Path, *, lock: int | None = None, resumed: bool = False, note: str = "") -> None:
        self.path = Path(path)
        self.resumed = resumed
        self.note = note
        self._lock = lock

    def __reduce__(self) -> tuple[type[RunFolder], tuple[Path]]:
        return RunFolder, (self.path,)  # the lock is not pickled: its handle is meaningless in another process

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
        """Return state.json: status, attempt, pid, created, started, updated (UTC, ISO), config_digest, message."""
        state = self._parsed("state.json")
        if lacking := [key for key in ("status", "created", "config_digest") if not isinstance(state.get(key), str)]:
            raise self._damage("state.json", f"no {', '.join(lacking)}")
        return state

    @property
    def locked(self) -> bool:
        """Return whether any process, including this one, runs this run. A copy without a lock file is not locked."""
        if not (self.path / "lock").exists():
            return False
        with _faults(self.path):
            handle = _try_lock(self.path / "lock", exclusive=False)
        if handle is not None:
            os.close(handle)
        return handle is None

    def set_status(self, status: str, message: str = "") -> None:
        """Write state.json; after a crash it contains the old status or the new one, never a part of one."""
        if status not in STATUSES:
            raise ValueError(f"run status {status!r} is not one of {', '.join(STATUSES)}")
        _write_state(self.path, self.state | {"status": status, "message": message, "updated": _now()})

    def write_text(self, name: str, text: str) -> None:
        """Write a file once, completely or not at all.

        Writing the same text again is allowed. Raises DataError if the file has other text.
        """
        path = self.path / name
        with _faults(path):
            if path.exists():
                if path.read_text() != text:
                    raise DataError(f"{path} already exists with other content and is not overwritten: use a new run")
                return
            _write_whole(path, text)

    def replace_text(self, name: str, text: str) -> None:
        """Replace a file, completely or not at all."""
        _write_whole(self.path / name, text)

    def block(self, name: str) -> dict[str, Any] | None:
        """Return the keys and values in a JSON or YAML file, or None if there is no file.

        Raises DataError if the file is damaged.
        """
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
        rename_settings(found)
        return found

    def _damage(self, name: str, what: str) -> DataError:
        return DataError(f"{self.path / name} is damaged ({what}): move {self.path} away and start again")

    def add_evidence(self, *records: Mapping[str, Any]) -> None:
        """Append records to evidence.jsonl, each linked to the one before it (`verl_aqn.runs.chain`)."""
        self.append(EVIDENCE, *records, link=True)

    def append(self, name: str, *records: Mapping[str, Any], link: bool = False) -> None:
        """Append a line of JSON for each record, all in one write.

        Writers in several processes take turns. A partial line left by a killed writer is removed; complete lines stay.
        numpy and torch scalars become numbers; NaN and infinities, which JSON does not have, become null. Raises
        EnvironmentFault if the disk is full.
        """
        texts = [_text(record) for record in records]
        path = self.path / name
        with _faults(path):
            handle = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # When a process is killed, the kernel stops its write between pages: a long line is then cut off, and
                # the next line would be appended to it.
                _cut_torn_line(handle)
                if link:
                    texts = _linked(_last_line(handle), texts)
                _write_all(handle, "".join(f"{text}\n" for text in texts).encode())
            finally:
                # Do not rely on close(): a process forked in the meantime keeps the file open, and with it the lock.
                fcntl.flock(handle, fcntl.LOCK_UN)
                os.close(handle)

    def read(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the records of `name` in order, or nothing if there is no such file.

        An incomplete last line is skipped: its writer was killed or is still writing. Raises DataError for damage
        elsewhere.
        """
        path = self.path / name
        if not path.exists():
            return
        with _faults(path), path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(current_fields(line))
                except ValueError as error:
                    raise DataError(f"{path} line {number} is damaged ({error}): remove that line") from error
                if not isinstance(record, dict):
                    raise DataError(f"{path} line {number} is damaged (no keys and values): remove that line")
                yield record

    def by_step(self, name: str, kind: str) -> dict[int, dict[str, Any]]:
        """Return the records of one kind by step, ascending.

        A resumed run repeats some steps: the later record is used.
        """
        found = {
            int(record["step"]): record
            for record in self.read(name)
            if record.get("kind") == kind and isinstance(record.get("step"), int)
        }
        return dict(sorted(found.items()))

    def close(self) -> None:
        """Release the lock. The kernel does the same when the process ends for any reason."""
        if self._lock in _locks:
            _locks.remove(self._lock)
            os.close(self._lock)
            self._lock = None


def open_run(base: Path, config: dict[str, Any], *, fresh: bool = False) -> RunFolder:
    """Return the folder for a run of `config` (plain values) under `base`, locked as long as this process lives.

    The run under `base` that was made last decides. If it is finished, a new run is created. If it stopped early and
    has the same config, it is resumed (attempt + 1). If it stopped early with another config, or because of its own
    evidence, a new run is created and `note` says so: the judge counts the faults of all attempts, so no later attempt
    could finish. If it is still running, BusyError is raised, even with `fresh`. Otherwise, `fresh` always creates a
    new run.

    Raises DataError if base/training.log or base/checkpoints is not a link to a run, and EnvironmentFault if `base`
    cannot be written, or if `base` or its contents may belong to another user (`verl_aqn.safe_files`).
    """
    # The path is absolute because the processes of a run, also on other nodes, have different working directories.
    base, digest = Path(base).absolute(), _digest(config)
    with _faults(base):
        own_folder(base)
        own_folder(base / "runs")
        for name in LINKS:
            if os.path.lexists(base / name) and not (base / name).is_symlink():
                raise DataError(f"{base / name} is not a link to a run and is not overwritten: move it away")
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
                    # The state is read under the lock: before that, the run may still be finishing.
                    state = newest.state
                    died = state["status"] != "finished"
                    same = state["config_digest"] == digest
                    if died and not fresh and same and not _was_stopped(newest):
                        own_entries(newest.path)
                        run = _resume(newest, state, lock)
                        release.pop_all()
                        return run
                if died and not fresh:
                    why = "was stopped by its own evidence" if same else "did not finish, and its config is different"
                    note = f"{newest.path.name} {why}: a new run was started"
            return _create(base, digest, note)


def runs_of(base: Path, config: dict[str, Any]) -> list[RunFolder]:
    """Return the runs of `config` (as `open_run` takes it) under `base`, newest last."""
    digest = _digest(config)
    return sorted(
        (run for run in _runs(base) if run.state["config_digest"] == digest), key=lambda run: run.state["created"]
    )


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _create(base: Path, digest: str, note: str) -> RunFolder:
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    # The folder is filled under a temporary name and then renamed, so that a visible run folder is always complete.
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
    how = "ended without a status" if state["status"] == "running" else state["status"]
    note = f"attempt {attempt} of {run.path.name}: the previous attempt {how}"
    return _hold(RunFolder(run.path, lock=lock, resumed=True, note=note))


def _was_stopped(run: RunFolder) -> bool:
    """Return whether an attempt at the run was ended by its own evidence."""
    return any(record.get("kind") == "stopped" for record in run.read(EVIDENCE))


def _newest(base: Path) -> RunFolder | None:
    """Return the run that was made last: the one that the links in `base` name, whatever the clock says of it.

    Without links the time of creation decides.
    """
    linked = (base / LINKS[0]).resolve().parent
    if linked.parent == (base / "runs").resolve() and (linked / "state.json").is_file():
        return RunFolder(base / "runs" / linked.name)
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
    """Return the records with their links. `before`: the line that the first of them follows."""
    lines = []
    for text in texts:
        lines.append(json.dumps(linked(before, json.loads(text))))
        before = lines[-1].encode()
    return lines


def _write_all(handle: int, data: bytes) -> None:
    if os.write(handle, data) < len(data):  # the disk filled up during the write; Linux writes up to 2 GB at once
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut_torn_line(handle: int) -> None:
    """Remove what a killed writer left after the last newline, so that the next record is not appended to it."""
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.ftruncate(handle, os.pread(handle, size, 0).rfind(b"\n") + 1)


def folder_of(config: Any) -> RunFolder:
    """Return the folder of a run, given the config that the run started with (`config.yaml`).

    `aqn.run.dir` is the folder that the user chose for all runs; verl's folder for checkpoints is in the run's own.
    """
    return RunFolder(Path(str(config.trainer.default_local_dir)).parent)


def _last_line(handle: int) -> bytes:
    """Return the last line without its newline, or empty bytes if there is none."""
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
    """Write a file so that after a crash or on a full disk it has its old content or all of `text`."""
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

_locks: set[int] = set()


def _close_in_child() -> None:
    """Close the locks in a forked child, such as a data loader's worker.

    The child shares its parent's flock and would keep it after the parent's death.
    """
    for handle in _locks:
        os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _hold(run: RunFolder) -> RunFolder:
    if run._lock is not None:
        _locks.add(run._lock)
    return run


def _try_lock(path: Path, *, exclusive: bool = True) -> int | None:
    """Return a handle that holds the flock of `path`, or None if another handle holds it.

    The kernel releases the lock on kill -9. If `exclusive` is False, the lock is only tested; the file must exist and
    may be read-only.
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
    """Let only one process at a time choose a run; otherwise two could both see a finished run and start a new one."""
    deadline = time.monotonic() + 30
    while (handle := _try_lock(base / "runs" / ".opening")) is None:
        if time.monotonic() > deadline:
            raise AqnError(f"another process has been opening a run in {base} for 30 s: stop that process")
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn the system's errors about `path`, or a file below it, into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFault(f"the disk is full at {path}: free some space and start the run again") from error
        # The system may have refused a file below `path`. A name relative to an open folder would say less.
        where = error.filename if isinstance(error.filename, str) and os.path.isabs(error.filename) else path
        raise EnvironmentFault(f"cannot use {where} ({error.strerror}): choose another aqn.run.dir") from error
