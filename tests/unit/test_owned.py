"""A machine with other users: what they created first, or can change, is rejected in one line and not touched."""

import os
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from verl_aqn import safe_files as owned
from verl_aqn.cluster.process_environment import engine_environment
from verl_aqn.errors import EnvironmentFault
from verl_aqn.mxfp4.kernels import native
from verl_aqn.runs.folder import open_run
from verl_aqn.runs.processes import start_module
from verl_aqn.safe_files import open_own, own_folder

CONFIG = {"seed": 1}
NEIGHBOUR, OTHER = 23456, 34567
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folders")


@pytest.fixture
def place():
    """A folder of root that everybody can enter, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="owned-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def shared(place) -> Path:
    """A folder in which everybody may create names, like /tmp."""
    (folder := place / "tmp").mkdir()
    folder.chmod(0o1777)
    return folder


@contextmanager
def user(number: int):
    """Act as another user."""
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


def listing(folder: Path) -> dict[str, tuple]:
    """Return everything below a folder, with attributes that would show a write."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (
            status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns if path.is_file() else 0,
        )  # fmt: skip
    return found


def refused(base: Path, *words: str, watched: Path | None = None) -> str:
    """Check for a one-line error with `words`, and that nothing below `watched` was written, created or deleted."""
    before = listing(watched or base.parent)
    with pytest.raises(EnvironmentFault) as caught:
        open_run(base, CONFIG)
    assert listing(watched or base.parent) == before
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


@as_root
def test_a_base_that_a_neighbour_made_first(shared):
    with user(NEIGHBOUR):
        (shared / "mxfp4_e12" / "runs").mkdir(parents=True)
    refused(shared / "mxfp4_e12", f"{shared}/mxfp4_e12 belongs to user {NEIGHBOUR}", "aqn.run.dir=DIR", watched=shared)


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_neighbours_base_that_all_may_write_to(shared, mode):
    with user(NEIGHBOUR):
        (shared / "mxfp4_e12").mkdir()
        (shared / "mxfp4_e12").chmod(mode)
    refused(shared / "mxfp4_e12", f"belongs to user {NEIGHBOUR}", watched=shared)


@as_root
def test_a_plans_folder_that_a_neighbour_made_first(shared):
    """Runs of a plan are one level deeper: /tmp/mxfp4_plan_X/ARM-seed0."""
    with user(NEIGHBOUR):
        (shared / "mxfp4_plan_x").mkdir()
        (shared / "mxfp4_plan_x").chmod(0o777)
    base = shared / "mxfp4_plan_x" / "arm-seed0"
    refused(base, f"mxfp4_plan_x belongs to user {NEIGHBOUR}", watched=shared)


@as_root
@pytest.mark.parametrize("target", ["home", "nowhere"])
def test_a_neighbours_link_in_the_place_of_the_base(shared, place, target):
    (place / "home").mkdir()
    with user(NEIGHBOUR):
        (shared / "mxfp4_e12").symlink_to(place / target)
    refused(shared / "mxfp4_e12", f"belongs to user {NEIGHBOUR}", watched=place)


@as_root
def test_a_neighbours_link_on_the_way_to_the_base(shared, place):
    (place / "home").mkdir()
    with user(NEIGHBOUR):
        (shared / "plan").symlink_to(place / "home")
    refused(shared / "plan" / "arm", f"{shared}/plan belongs to user {NEIGHBOUR}", watched=place)


@pytest.mark.parametrize("place", ["", "runs", "runs/RUN"])
def test_a_link_at_each_level(tmp_path, place):
    """However the link got there: the folder may have been writable for everybody before."""
    base = tmp_path / "base"
    run = open_run(base, CONFIG)
    run.close()
    level = base / place.replace("RUN", run.path.name)
    level.rename(tmp_path / "moved")
    level.symlink_to(tmp_path / "moved")
    refused(base, f"{level} is a link", watched=tmp_path)


@pytest.mark.parametrize(
    "name", ["launch.yaml", "training.log", "events.jsonl", "state.json", "lock", "checkpoints", "stacks-2.txt"]
)
def test_a_link_in_the_place_of_a_file_of_a_run(tmp_path, name):
    run = open_run(tmp_path / "base", CONFIG)
    run.close()
    file = run.path / name
    if file.exists():
        file.rename(tmp_path / "moved")
    else:
        (tmp_path / "moved").write_text("precious")
    file.symlink_to(tmp_path / "moved")
    refused(tmp_path / "base", f"{file} is a link", watched=tmp_path)


@as_root
@pytest.mark.parametrize("place", ["", "runs", "runs/RUN", "runs/RUN/launch.yaml"])
def test_what_belongs_to_another_user_at_each_level(tmp_path, place):
    run = open_run(tmp_path / "base", CONFIG)
    run.write_text("launch.yaml", "seed: 1")
    run.close()
    level = tmp_path / "base" / place.replace("RUN", run.path.name)
    os.chown(level, NEIGHBOUR, NEIGHBOUR)
    refused(tmp_path / "base", f"{level} belongs to user {NEIGHBOUR}", watched=tmp_path)


@pytest.mark.parametrize("place", ["", "runs", "runs/RUN"])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_an_own_folder_that_others_can_write_to(tmp_path, place, mode):
    run = open_run(tmp_path / "base", CONFIG)
    run.close()
    level = tmp_path / "base" / place.replace("RUN", run.path.name)
    level.chmod(mode)
    refused(tmp_path / "base", str(level), "others", "chmod go-w", watched=tmp_path)
    level.chmod(0o755)
    assert open_run(tmp_path / "base", CONFIG).path == run.path


def test_an_own_file_that_others_can_write_to(tmp_path):
    run = open_run(tmp_path / "base", CONFIG)
    run.write_text("launch.yaml", "seed: 1")
    run.close()
    (run.path / "launch.yaml").chmod(0o666)
    refused(tmp_path / "base", f"{run.path}/launch.yaml is writable by others", "chmod go-w", watched=tmp_path)


def test_a_folder_on_the_way_that_lets_everybody_rename(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    refused(tmp_path / "open" / "base", f"{tmp_path}/open lets everybody rename", "chmod +t", watched=tmp_path)
    (tmp_path / "open").chmod(0o1777)
    assert open_run(tmp_path / "open" / "base", CONFIG).path.is_dir()


@as_root
def test_a_group_other_than_ones_own_may_not_write(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    base.chmod(0o775)
    own_folder(base)  # root's own group, as many systems make one for each user
    os.chown(base, 0, NEIGHBOUR)
    refused(base, f"{base} is writable by others")


def test_links_of_the_users_own_on_the_way_are_followed(shared, place):
    """The same holds for root's links: /tmp itself is one on some machines."""
    (place / "disk").mkdir()
    (place / "short").symlink_to("disk")
    (shared / "mine").symlink_to(place / "short")
    run = open_run(shared / "mine" / "base", CONFIG)
    assert (place / "disk" / "base" / "runs" / run.path.name).is_dir()
    (place / "round").symlink_to("round")
    with pytest.raises(EnvironmentFault, match="too many links"):
        own_folder(place / "round" / "base")


@as_root
def test_another_user_than_root(shared):
    """Folders of root and of the user are accepted, those of another user are not."""
    (shared / "roots").mkdir()
    (shared / "roots").chmod(0o1777)
    with user(OTHER):
        (shared / "others").mkdir()
        (shared / "others").chmod(0o1777)
    with user(NEIGHBOUR):
        assert open_run(shared / "base", CONFIG).path.is_dir()
        assert open_run(shared / "roots" / "base", CONFIG).path.is_dir()
        refused(shared / "others" / "base", f"{shared}/others belongs to user {OTHER}")
        refused(shared / "roots", f"{shared}/roots belongs to root, not to user {NEIGHBOUR}")


@as_root
def test_on_a_networks_disk_roots_folder_may_be_nobodys(tmp_path, monkeypatch):
    run = open_run(tmp_path / "base", CONFIG)
    run.close()
    for path in (tmp_path / "base", *(tmp_path / "base").rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    refused(tmp_path / "base", f"{tmp_path}/base belongs to")
    monkeypatch.setattr(owned, "_is_of_network", lambda device: True)
    assert open_run(tmp_path / "base", CONFIG).path == run.path
    monkeypatch.undo()
    assert not owned._is_of_network(tmp_path.stat().st_dev)


@as_root
def test_code_in_a_cache_that_a_neighbour_made_is_not_loaded(shared, monkeypatch):
    with user(NEIGHBOUR):
        (shared / "cache" / "kernels").mkdir(parents=True)
    monkeypatch.setenv("VERL_AQN_CACHE", str(shared / "cache"))
    native._library.cache_clear()
    try:
        with pytest.raises(EnvironmentFault, match=f"cache belongs to user {NEIGHBOUR}.*VERL_AQN_CACHE=DIR"):
            native.status()
        with pytest.raises(EnvironmentFault, match="VERL_AQN_CACHE=DIR"):
            engine_environment("/tmp", cpu=True, ranks=1)
    finally:
        native._library.cache_clear()
    own_folder(place := Path("/usr/lib"), or_roots=True)
    with user(NEIGHBOUR):
        own_folder(place, or_roots=True)
        with pytest.raises(EnvironmentFault, match="belongs to root"):
            own_folder(place)


def test_a_new_base_is_writable_by_the_user_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        run = open_run(tmp_path / "deep" / "base", CONFIG)
        run.append("events.jsonl", {"kind": "x"})
    finally:
        os.umask(before)
    for path in (tmp_path / "deep", *(tmp_path / "deep").rglob("*")):
        if not path.is_symlink():
            assert not path.stat().st_mode & 0o022, path


def test_a_file_is_opened_without_following_a_link_or_waiting_at_a_pipe(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "log").symlink_to(tmp_path / "precious")
    for flags in (os.O_WRONLY | os.O_APPEND | os.O_CREAT, os.O_RDONLY):
        with pytest.raises(EnvironmentFault, match="log is a link, and links are not followed: move it away"):
            open_own(tmp_path / "log", flags)
    with pytest.raises(EnvironmentFault, match="is a link"):
        start_module("this", [], {}, tmp_path / "log")
    assert (tmp_path / "precious").read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EnvironmentFault, match="is not a regular file"):
        open_own(tmp_path / "pipe", os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "none", os.O_RDONLY)


@as_root
def test_a_folder_exchanged_while_it_is_looked_at(shared, monkeypatch):
    """Each folder is opened from its parent, and the opened folder is the one that is checked."""
    with user(NEIGHBOUR):
        (shared / "theirs").mkdir()
    (shared / "base").mkdir()
    real, turns = owned._unsafe, []

    def late(status, above, *, on_the_way):
        if not on_the_way and not turns:
            turns.append(1)
            (shared / "base").rename(shared / "gone")
            (shared / "theirs").rename(shared / "base")
        return real(status, above, on_the_way=on_the_way)

    monkeypatch.setattr(owned, "_unsafe", late)
    own_folder(shared / "base")  # it checked our folder
    with pytest.raises(EnvironmentFault, match=f"belongs to user {NEIGHBOUR}"):
        own_folder(shared / "base")


@as_root
def test_the_command_refuses_in_a_line_before_any_work(shared):
    with user(NEIGHBOUR):
        (shared / "mxfp4_e12").mkdir()
    code = "import sys; from verl_aqn.cli.main import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        "e12_aggressive_1ep",
        "profile=cpu",
        f"aqn.run.dir={shared}/mxfp4_e12",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "VERL_AQN_CACHE": "/nonexistent/never-made"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"belongs to user {NEIGHBOUR}" in result.stderr
    assert not list((shared / "mxfp4_e12").iterdir())
    assert stat.S_IMODE((shared / "mxfp4_e12").stat().st_mode) == 0o755


@as_root
def test_the_lines_in_the_docs_are_those_that_are_told(shared, place):
    with user(NEIGHBOUR):
        (shared / "theirs").mkdir()
    (place / "link").symlink_to(shared)
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    docs = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    for base in (shared / "theirs", place / "link", place / "open"):
        told = refused(base, watched=place).removeprefix(f"{base} ").replace(f"user {NEIGHBOUR}", "mallory")
        assert told in docs
