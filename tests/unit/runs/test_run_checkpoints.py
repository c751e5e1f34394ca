"""Checkpoints are complete or absent, however their writer is killed and whatever happens to their files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.full_disk import full_disk
from verl_aqn.errors import ConfigError, DataError, EnvironmentFault
from verl_aqn.runs.checkpoints import DIGESTS, LATEST, damage_of, newest_whole, point_to, publish, saving


def write(checkpoints: Path, step: int, keep: int | None = 2) -> Path:
    folder = checkpoints / ".writing" / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "model.pt").write_bytes(bytes([step]) * 1000)
    (folder / "data.pt").write_bytes(b"data")
    assert publish(folder, checkpoints, keep) == 1004
    return checkpoints / f"global_step_{step}"


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.glob("global_step_*"))


def test_the_newest_are_kept_and_the_last_is_named(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, step)
    assert names(tmp_path) == ["global_step_10", "global_step_9"], (
        "a step that was taken again does not remove a later one"
    )
    assert (tmp_path / LATEST).read_text() == "9"
    assert newest_whole(tmp_path) == (10, [])
    assert set(json.loads((tmp_path / "global_step_9" / DIGESTS).read_text())) == {"actor/model.pt", "data.pt"}
    write(tmp_path, 11, keep=None)
    assert len(names(tmp_path)) == 3


def test_whatever_finds_the_disk_full_says_so(tmp_path):
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    large = {"a": torch.zeros(10_000)}
    for write_file in (
        lambda: torch.save(large, tmp_path / "model.pt"),
        lambda: safetensors.save_file(large, tmp_path / "adapter.safetensors"),
        lambda: (tmp_path / "told.json").write_text("1" * 10_000),
    ):
        with (
            full_disk(),
            pytest.raises(EnvironmentFault, match=rf"{tmp_path} could not be written") as caught,
            saving(tmp_path),
        ):
            write_file()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ConfigError("ours"), RuntimeError("another"), FileNotFoundError("gone")])
def test_other_errors_of_a_checkpoint_stay(tmp_path, error):
    with pytest.raises(type(error)) as caught, saving(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("harm", ["changed", "cut", "missing", "digests"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    file = folder / "actor" / "model.pt"
    if harm == "changed":
        file.write_bytes(b"\0" + file.read_bytes()[1:])
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "missing":
        file.unlink()
    else:
        (folder / DIGESTS).write_text("{")
    step, (wrong,) = newest_whole(tmp_path)
    assert step == 1
    assert str(folder) in wrong
    point_to(tmp_path, step)
    assert (tmp_path / LATEST).read_text() == "1"
    (tmp_path / "global_step_1" / "data.pt").unlink()
    with pytest.raises(DataError, match="there is no undamaged older checkpoint: move"):
        newest_whole(tmp_path)
    write(tmp_path, 2)  # saved again: the damaged one is replaced
    assert newest_whole(tmp_path) == (2, [])


def test_checkpoints_of_older_versions_have_no_digests(tmp_path):
    for step in (1, 2):
        (tmp_path / f"global_step_{step}").mkdir()
    (tmp_path / LATEST).write_text("1")
    assert newest_whole(tmp_path)[0] == 1, "the second was not written to its end"
    assert damage_of(tmp_path / "global_step_1") == ""
    assert newest_whole(tmp_path / "nothing") == (0, [])


def test_killed_at_any_call_the_last_whole_one_is_found(tmp_path):
    """A writer is killed before its first, second, … call that changes the disk, until one completes."""
    program = (
        "import os, signal, sys; from pathlib import Path; from verl_aqn.runs import checkpoints as c\n"
        "left, place = int(sys.argv[1]), Path(sys.argv[2])\n"
        "def killing(call):\n"
        "    def counted(*a, **k):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(*a, **k)\n"
        "    return counted\n"
        "written = place / '.writing' / 'global_step_3'\n"
        "for name in ('rename', 'replace', 'open'): setattr(c.Path, name, killing(getattr(c.Path, name)))\n"
        "c.shutil.rmtree = killing(c.shutil.rmtree); c.os.fsync = killing(c.os.fsync)\n"
        "c.publish(written, place, 2)\n"
    )
    found = []
    for calls in range(40):
        place = tmp_path / str(calls)
        for step in (1, 2):
            write(place, step)
        (place / ".writing" / "global_step_3").mkdir(parents=True)
        (place / ".writing" / "global_step_3" / "data.pt").write_bytes(b"data")
        process = subprocess.run([sys.executable, "-c", program, str(calls), str(place)], check=False)
        step, wrong = newest_whole(place)
        assert wrong == []
        found.append(step)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert os.listdir(place / ".writing") == []
    assert sorted(found) == found, "once the new one is found it stays"
    assert set(found) == {2, 3}
    assert names(place) == ["global_step_2", "global_step_3"]
