"""Run folders: nothing is overwritten, dead runs are resumed, live ones are not touched, however a process dies."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from verl_aqn.config.trackers import stay_here
from verl_aqn.errors import AqnError, BusyError, DataError, EnvironmentFault
from verl_aqn.runs import folder
from verl_aqn.runs.chain import broken
from verl_aqn.runs.folder import RunFolder, open_run, runs_of

CONFIG = {"aqn": {"noise": {"sigma_start": 0.05}}, "seed": 1}


@pytest.fixture
def base(tmp_path):
    return tmp_path / "mxfp4_e12_aggressive_1ep"


def end(run: RunFolder, status: str) -> RunFolder:
    run.set_status(status)
    run.close()
    return run


def test_records_of_one_write_are_linked_and_a_killed_writer_leaves_whole_ones(tmp_path):
    run = RunFolder(tmp_path)
    run.add_evidence({"kind": "a", "x": float("nan")})
    run.add_evidence(*({"kind": "b", "rank": rank, "text": "x" * 100} for rank in range(50)))
    run.add_evidence()
    file = tmp_path / "evidence.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines()
    assert (len(lines), broken(lines)) == (51, (51, []))
    for cut in (len(whole) - 1, len(whole) - 150, len(whole) // 2, 1):  # the kernel stops a write anywhere
        file.write_bytes(whole[:cut])
        run.add_evidence({"kind": "c"}, {"kind": "d"})
        lines = file.read_bytes().splitlines()
        assert broken(lines) == (len(lines), [])
        assert [json.loads(line)["kind"] for line in lines[-2:]] == ["c", "d"]
        assert len(lines) == whole[:cut].count(b"\n") + 2


def test_a_new_run_is_complete(base):
    run = open_run(base, CONFIG)
    assert run.path.parent == base / "runs"
    assert run.state["status"] == "running"
    assert (run.state["attempt"], run.state["pid"]) == (1, os.getpid())
    assert (base / "training.log").resolve() == run.log.resolve()
    assert (base / "checkpoints").resolve() == run.checkpoints.resolve()
    assert run.checkpoints.is_dir()
    assert (run.resumed, run.note, run.locked) == (False, "", True)


def test_after_a_finished_run_comes_a_new_one_and_the_old_log_stays(base):
    """Fixed output folders were overwritten before, which lost seven logs."""
    runs = []
    for n in range(4):
        run = open_run(base, CONFIG)
        run.log.write_text(f"log of run {n}")
        assert (base / "training.log").read_text() == f"log of run {n}"
        runs.append(end(run, "finished"))
    assert len({run.path for run in runs}) == 4
    assert [run.log.read_text() for run in runs] == [f"log of run {n}" for n in range(4)]


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_dead_run_of_the_same_config_is_resumed(base, status):
    first = open_run(base, CONFIG)
    first.append("metrics.jsonl", {"step": 0})
    end(first, status)
    again = open_run(base, dict(reversed(CONFIG.items())))  # a different order of keys is the same config
    assert again.path == first.path
    assert again.resumed
    assert "attempt 2" in again.note
    assert again.state["attempt"] == 2
    assert again.state["status"] == "running"
    assert list(again.read("metrics.jsonl")) == [{"step": 0}]


def test_a_dead_run_of_another_config_is_left_and_named(base):
    first = end(open_run(base, CONFIG), "failed")
    second = open_run(base, CONFIG | {"seed": 2})
    assert second.path != first.path
    assert not second.resumed
    assert first.path.name in second.note
    assert first.state["status"] == "failed"


def test_a_run_that_its_evidence_stopped_is_not_resumed(base):
    """Its faults stay on record, so that every later attempt would train to the end and fail there."""
    first = open_run(base, CONFIG)
    first.add_evidence({"kind": "stopped", "reason": "the norms are not clean"})
    end(first, "failed")
    second = open_run(base, CONFIG)
    assert (second.path != first.path, second.resumed) == (True, False)
    assert second.note == f"{first.path.name} was stopped by its own evidence: a new run was started"
    end(second, "interrupted")
    assert open_run(base, CONFIG).path == second.path


def test_the_newest_run_counts_even_among_those_of_one_second(base, monkeypatch):
    for part, status in [("ffffff", "finished"), ("000000", "failed")]:
        monkeypatch.setattr("secrets.token_hex", lambda _, part=part: part)
        newest = end(open_run(base, CONFIG), status)
    assert open_run(base, CONFIG).path == newest.path


def test_a_clock_that_was_set_back_hides_no_run(base, monkeypatch):
    end(open_run(base, CONFIG), "finished")
    monkeypatch.setattr(folder, "_now", lambda: "2001-01-01T00:00:00.000000+00:00")
    second = open_run(base, CONFIG)
    with pytest.raises(BusyError, match=second.path.name):
        open_run(base, CONFIG)
    end(second, "failed")
    again = open_run(base, CONFIG)
    assert (again.path, again.resumed) == (second.path, True)
    end(again, "failed")
    for link in folder.LINKS:  # as after a copy
        (base / link).unlink()
    assert open_run(base, CONFIG).path != second.path


def test_fresh_is_always_a_new_run(base):
    first = end(open_run(base, CONFIG), "failed")
    second = open_run(base, CONFIG, fresh=True)
    assert second.path != first.path
    assert (second.resumed, second.note) == (False, "")


@pytest.mark.parametrize("fresh", [False, True])
def test_a_living_run_is_not_disturbed(base, fresh):
    run = open_run(base, CONFIG)
    with pytest.raises(AqnError, match="in progress") as error:
        open_run(base, CONFIG, fresh=fresh)
    assert str(run.path) in str(error.value)
    assert run.state["attempt"] == 1


@pytest.mark.parametrize("name", ["training.log", "checkpoints"])
def test_a_real_file_in_the_links_place_is_not_overwritten(base, name):
    base.mkdir()
    (base / name).mkdir() if name == "checkpoints" else (base / name).write_text("precious")
    with pytest.raises(DataError, match=name):
        open_run(base, CONFIG)
    assert (base / name).exists()
    assert not list((base / "runs").iterdir())


def test_a_moved_base_keeps_working(base, tmp_path):
    end(open_run(base, CONFIG), "finished").log.write_text("here")
    base.rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "training.log").read_text() == "here"


def test_a_relative_base_is_the_same_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run(Path("runs/a"), CONFIG)
    assert run.path.is_absolute()
    assert run.path.parent == tmp_path / "runs/a/runs"
    stay_here({}, run.path, 1)  # MLflow's location is a URI


def test_written_texts_are_not_overwritten(base):
    run = open_run(base, CONFIG)
    run.write_text("config.yaml", "seed: 1\n")
    run.write_text("config.yaml", "seed: 1\n")
    with pytest.raises(DataError, match="not overwritten"):
        run.write_text("config.yaml", "seed: 2\n")
    assert (run.path / "config.yaml").read_text() == "seed: 1\n"


def test_a_text_is_written_whole_or_not_at_all(base, monkeypatch):
    run = open_run(base, CONFIG)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        run.write_text("config.yaml", "seed: 1\n")
    monkeypatch.undo()
    assert not (run.path / "config.yaml").exists()
    run.write_text("config.yaml", "seed: 1\n")


def test_records_keep_their_order_and_scalars_become_numbers(base):
    run = open_run(base, CONFIG)
    run.append("metrics.jsonl", {"step": np.int64(3), "reward": np.float32(0.5), "text": "zwei\nZeilen σ"})
    run.append("metrics.jsonl", {"step": 4})
    assert list(run.read("metrics.jsonl")) == [{"step": 3, "reward": 0.5, "text": "zwei\nZeilen σ"}, {"step": 4}]
    assert list(run.read("evidence.jsonl")) == []
    with pytest.raises((TypeError, AttributeError)):
        run.append("metrics.jsonl", {"step": object()})


def test_a_torn_last_line_is_skipped_and_cut_on_resume(base):
    run = open_run(base, CONFIG)
    run.append("metrics.jsonl", {"step": 0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rew')
    assert list(run.read("metrics.jsonl")) == [{"step": 0}]
    end(run, "running")
    again = open_run(base, CONFIG)
    again.append("metrics.jsonl", {"step": 1})
    assert list(again.read("metrics.jsonl")) == [{"step": 0}, {"step": 1}]


def test_damage_in_the_middle_is_not_swallowed(base):
    run = open_run(base, CONFIG)
    (run.path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        list(run.read("metrics.jsonl"))


@pytest.mark.parametrize("text", ["{}", "[]", '{"status": "failed", "created": 5}'])
def test_a_state_that_says_nothing_is_damaged(base, text):
    run = end(open_run(base, CONFIG), "failed")
    (run.path / "state.json").write_text(text)
    for look in (lambda: run.state, lambda: open_run(base, CONFIG), lambda: runs_of(base, CONFIG)):
        with pytest.raises(DataError, match=r"state\.json is damaged .*: move .* away"):
            look()


def test_damaged_state_is_named(base):
    run = end(open_run(base, CONFIG), "failed")
    (run.path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json is damaged"):
        open_run(base, CONFIG)
    assert not run.locked


def test_unknown_status_is_refused(base):
    with pytest.raises(ValueError, match="finished"):
        open_run(base, CONFIG).set_status("done")


def test_unusable_base_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"aqn\.run\.dir"):
        open_run(tmp_path / "file" / "base", CONFIG)


def test_a_file_that_the_system_refuses_is_named(base):
    first = end(open_run(base, CONFIG), "failed")
    (first.path / "notes.jsonl").mkdir()
    with pytest.raises(EnvironmentFault, match=rf"^cannot use {first.path}/notes\.jsonl \(Is a directory\)"):
        open_run(base, CONFIG)


def test_full_disk_is_named(base, monkeypatch):
    run = open_run(base, CONFIG)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EnvironmentFault, match="disk is full"):
        run.append("metrics.jsonl", {"step": 0})


def test_a_write_cut_short_is_a_full_disk(base, monkeypatch):
    run = open_run(base, CONFIG)
    monkeypatch.setattr(os, "write", lambda handle, data: len(data) - 1)
    with pytest.raises(EnvironmentFault, match="disk is full"):
        run.append("metrics.jsonl", {"step": 0})


def test_a_state_that_cannot_be_written_leaves_the_old_one(base, monkeypatch):
    run = open_run(base, CONFIG)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="disk is full"):
        run.set_status("finished")
    assert run.state["status"] == "running"


def test_another_process_gets_the_folder_without_the_lock(base):
    run = open_run(base, CONFIG)
    other = pickle.loads(pickle.dumps(run))
    other.close()
    assert run.locked


WORKER = """
import sys
from pathlib import Path
from verl_aqn.runs.folder import open_run
run = open_run(Path(sys.argv[1]), {"seed": 1})
step = 0
while True:
    run.append("metrics.jsonl", {"step": step, "padding": "x" * 2000})
    step += 1
    if step == 20:
        print("going", flush=True)
"""


def test_kill_9_frees_the_lock_and_loses_no_record(base):
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(base)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    with pytest.raises(AqnError, match=f"pid {process.pid}"):
        open_run(base, {"seed": 1})
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = open_run(base, {"seed": 1})
    assert run.resumed
    assert "ended without a status" in run.note
    steps = [record["step"] for record in run.read("metrics.jsonl")]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 20
    run.append("metrics.jsonl", {"step": len(steps)})
    assert [record["step"] for record in run.read("metrics.jsonl")] == list(range(len(steps) + 1))


FORKER = """
import os, sys, time
from pathlib import Path
from verl_aqn.runs.folder import open_run
run = open_run(Path(sys.argv[1]), {"seed": 1})
child = os.fork()
if child == 0:
    os.close(1)  # the test reads until the parent's end of the pipe closes
    time.sleep(30)
    os._exit(0)
time.sleep(0.2)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_forked_child_that_outlives_the_run_does_not_keep_the_lock(base):
    done = subprocess.run([sys.executable, "-c", FORKER, str(base)], stdout=subprocess.PIPE, text=True, check=False)
    child = int(done.stdout)
    try:
        os.kill(child, 0)  # still there
        assert open_run(base, {"seed": 1}).resumed
    finally:
        os.kill(child, signal.SIGKILL)


def write_many(path, writer):
    run = RunFolder(path)
    for n in range(100):
        run.append("evidence.jsonl", {"writer": writer, "n": n, "padding": "x" * (37 * writer)})


def test_ten_writers_never_mix_their_lines(base):
    run = open_run(base, CONFIG)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(run.path, writer)) for writer in range(10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records = list(run.read("evidence.jsonl"))
    assert len(records) == 1000
    for writer in range(10):
        assert [r["n"] for r in records if r["writer"] == writer] == list(range(100))


def write_until_killed(path, writer, done, kilobytes):
    run = RunFolder(path)
    for n in range(10**9):
        run.append("evidence.jsonl", {"writer": writer, "n": n, "padding": "x" * (kilobytes * 1000)})
        done[writer] = n + 1


@pytest.mark.parametrize("kilobytes", [1, 1500])  # the kernel stops a killed write between pages, so long lines are cut
def test_ten_writers_killed_at_random_lose_no_finished_record(base, kilobytes):
    run, rng = open_run(base, CONFIG), np.random.default_rng(kilobytes)
    context = multiprocessing.get_context("fork")
    done = context.RawArray("l", 10)
    writers = [
        context.Process(target=write_until_killed, args=(run.path, writer, done, kilobytes)) for writer in range(10)
    ]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while min(done) < 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    for writer in rng.permutation(10):
        time.sleep(rng.uniform(0, 0.02))  # the remaining processes continue writing after the dead one
        writers[writer].kill()
    for writer in writers:
        writer.join()
    run.append("evidence.jsonl", {"writer": 10, "n": 0})
    records = list(run.read("evidence.jsonl"))
    assert records[-1] == {"writer": 10, "n": 0}
    for writer, finished in enumerate(done):
        found = [record["n"] for record in records if record["writer"] == writer]
        assert found == list(range(len(found)))
        assert finished <= len(found) <= finished + 1
        assert finished
    # Complete lines, also for other programs.
    assert [json.loads(line) for line in (run.path / "evidence.jsonl").read_text().splitlines()] == records


def test_a_torn_line_in_front_of_a_living_writer_does_not_spoil_its_record(base):
    run = open_run(base, CONFIG)
    path = run.path / "evidence.jsonl"
    for before in ("", '{"step": 0}\n'):
        path.write_text(before + '{"step": 1, "rew')
        run.append("evidence.jsonl", {"step": 2})
        assert path.read_text() == before + '{"step": 2}\n'


def test_of_ten_starters_one_gets_the_run(base):
    """Threads are enough, because each open file has its own flock."""

    def start(_):
        try:
            return open_run(base, CONFIG)
        except AqnError:
            return None

    with ThreadPoolExecutor(10) as pool:
        runs = [run for run in pool.map(start, range(10)) if run]
    assert len(runs) == 1
    assert len([p for p in (base / "runs").iterdir() if p.is_dir()]) == 1


def test_state_is_readable_at_any_moment(base):
    run = open_run(base, CONFIG)
    until = time.monotonic() + 0.5
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(lambda: [run.state["status"] for _ in iter(lambda: time.monotonic() < until, False)])
        while time.monotonic() < until:
            run.set_status("running", "x" * 10_000)
        assert set(reader.result()) == {"running"}
    assert json.loads((run.path / "state.json").read_text())["message"].startswith("x")
