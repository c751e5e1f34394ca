"""The command in difficult surroundings: folders that are not writable, no home, limited terminals, signals.

Each case gives a one-line message and the right exit code, and leaves nothing in the working directory or at home.
"""

import ast
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.run_folders import write_run
from tests.helpers.users import NOBODY, as_a_user
from verl_aqn.cache import NO_HOME, cache_dir
from verl_aqn.environment import drop_empty
from verl_aqn.errors import EnvironmentFault

ROOT = Path(__file__).resolve().parents[3]
# Several commands in one process, as a shell would start them, separated by record separators.
COMMANDS = """
import json, os, sys
from verl_aqn.cli import main as cli
for line in json.loads(os.environ["COMMANDS"]):
    sys.argv = ["verl-aqn", *line]
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    print(chr(30) + str(code or 0), end=chr(30), file=sys.stderr, flush=True)
"""
OF_MATPLOTLIB = {".config", ".config/matplotlib", ".cache", ".cache/matplotlib"}  # wherever it is imported


@pytest.fixture
def place(tmp_path) -> Path:
    """Folders: `cwd`, `home`, `locked` (nothing can be created in it), `source` of data, `nobody` for PYTHONPATH."""
    for name in ("cwd", "home", "locked", "source", "nobody"):
        (tmp_path / name).mkdir()
    (tmp_path / "locked").chmod(0o555)
    (tmp_path / "nobody" / "sitecustomize.py").write_text(NOBODY)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for split in ("train", "test"):
        (tmp_path / "source" / f"{split}.jsonl").write_text('{"question": "40 + 2?", "answer": "#### 42"}\n')
    write_run(tmp_path / "runs")
    return tmp_path


def environment(place: Path, **variables: str | None) -> dict[str, str]:
    """Return this environment with another home; None removes a variable."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(place / "home"), **variables}
    env.pop("LD_PRELOAD", None)  # set by vLLM, if another test has imported it in this process
    for name in ("VERL_AQN_CACHE", "XDG_CACHE_HOME", "RAY_ADDRESS", "PYTHONUTF8", "PYTHONIOENCODING"):
        if name not in variables:
            env.pop(name, None)
    return {name: value for name, value in env.items() if value is not None}


# What a user types → (exit code, a part of the line on standard error, "" for none).
REFUSED = {
    "train nope": (2, "no recipe 'nope'"),
    "train e12 profile=cpu aqn.run.dir=/a=b": (2, """write 'aqn.run.dir="/a=b"'"""),
    "train e12 profile=cpu aqn.run.dir={place}/locked/r": (1, "run's folder: {place}/locked cannot be written"),
    """train e12 profile=cpu aqn.run.dir="~nosuchuser/r" """: (2, "a path begins with ~"),
    "runs {place}/nowhere": (1, "{place}/nowhere does not exist"),
    "data gsm8k --source {place}/source --dst {place}/locked/d": (1, "(Permission denied)"),
    "data gsm8k --source {place}/source --dst {place}/dangling": (1, "{place}/dangling/train.parquet cannot be"),
    "report {place}/runs -o {place}/locked/r.html": (1, "{place}/locked/r.html (Permission denied)"),
    "report {place}/runs -o {place}/dangling": (2, "exists and is not overwritten"),
    "schedule e12 profile=cpu": (0, ""),
    "schedule e12 profile=cpu --json": (0, ""),
}
CACHE = "data gsm8k --source {place}/source"  # into the cache
HOSTILE = {
    "nothing of the kind": ({}, {}),
    "an ASCII terminal": ({"PYTHONIOENCODING": "ascii"}, {}),
    "a Latin-1 terminal": ({"PYTHONIOENCODING": "latin-1"}, {}),
    "a locale without UTF-8": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}),
    "a home that cannot be written": (
        {"HOME": "{place}/locked"},
        {CACHE: (1, "/locked/.cache/verl-aqn/data/gsm8k/train.parquet cannot be written (Permission denied)"),
         "train e12 profile=cpu aqn.run.dir={place}/locked/r": (1, "cache: {place}/locked cannot be written"),
         "train e12 profile=cpu --dry-run": (1, "set VERL_AQN_CACHE to a folder")},
    ),
    "no home": (
        {"HOME": None, "PYTHONPATH": f"{{place}}/nobody:{ROOT}"},
        {CACHE: (1, "no home folder is known"),
         "train e12 profile=cpu aqn.run.dir={place}/locked/r": (1, "no home folder is known"),
         "train e12 profile=cpu --dry-run": (1, "set VERL_AQN_CACHE to a folder")},
    ),
    "a cache that is a file": (
        {"VERL_AQN_CACHE": "{place}/source/train.jsonl"},
        {CACHE: (1, "/train.jsonl/data/gsm8k/train.parquet cannot be written (Not a directory)"),
         "train e12 profile=cpu aqn.run.dir={place}/locked/r": (1, "cache: {place}/source/train.jsonl cannot be")},
    ),
    "variables without a value": (
        dict.fromkeys(("RAY_ADDRESS", "XDG_CACHE_HOME", "VERL_AQN_CACHE", "OMP_NUM_THREADS", "TMPDIR", "CXX"), ""), {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_every_refusal_is_one_line_wherever_the_command_runs(place, case):
    variables, other = HOSTILE[case]
    told = {name: value and value.format(place=place) for name, value in variables.items()}
    expected = {
        command.format(place=place): (code, words.format(place=place))
        for command, (code, words) in (REFUSED | other).items()
    }
    env = environment(place, **told) | {"COMMANDS": json.dumps([command.split() for command in expected])}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=place / "cwd", env=env, capture_output=True, preexec_fn=as_a_user
    )
    said = done.stderr.decode(errors="replace")
    assert "Traceback" not in said
    *parts, _ = said.split(chr(30))
    assert len(parts) == 2 * len(expected), said
    for (command, (code, words)), line, ended in zip(expected.items(), parts[::2], parts[1::2], strict=True):
        assert (int(ended), words in line) == (code, True), (command, line, ended)
        assert line.count("\n") == (code > 0), (command, line)
        assert line.startswith("error: ") == (code > 0)
    shown = done.stdout.decode("latin-1" if "latin" in str(told) else "ascii" if told.get("LC_ALL") else "utf-8")
    assert ("sigma of e12 over 29 steps" in shown) != ("σ of e12 over 29 steps" in shown)
    for name in ("cwd", "home", "locked"):
        left = {str(path.relative_to(place / name)) for path in (place / name).rglob("*")}
        assert left <= OF_MATPLOTLIB, (name, left)


def test_a_user_s_own_folder_serves_where_there_is_no_home(place):
    """Libraries that look for a home find one there, not in the working directory."""
    told = {"HOME": None, "PYTHONPATH": f"{place}/nobody:{ROOT}", "VERL_AQN_CACHE": f"{place}/cache"}
    code = (
        "import getpass, os; from verl_aqn.environment import settle; settle(); print(getpass.getuser());"
        "print(os.path.expanduser('~')); from verl_aqn.cli import main as cli;"
        "import sys; sys.argv = sys.argv[1:]; cli.main()"
    )
    arguments = ["verl-aqn", "data", "gsm8k", "--source", str(place / "source")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=place / "cwd", env=environment(place, **told), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[1] == f"{place}/cache/home"
    assert (place / "cache" / "data" / "gsm8k" / "train.parquet").is_file()
    assert not list((place / "cwd").iterdir())


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [("/dev/full", 1, "No space left on device: free some space"), ("closed", 0, ""), ("nobody reads", 1, "")],
)
def test_output_that_cannot_be_written(place, output, code, words):
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full:
        stdout, before = (full if output == "/dev/full" else writing), None
        if output == "closed":
            before = partial(os.close, 1)
        done = subprocess.run(
            [sys.executable, "-m", "verl_aqn.cli", "schedule", "e12", "profile=cpu"], env=environment(place),
            stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=before,
        )  # fmt: skip
    os.close(writing)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stderr.count("\n") == bool(words), done.stderr


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(place):
    """A limit on file size stands for a full disk; the system reports both alike."""
    done = subprocess.run(
        [sys.executable, "-m", "verl_aqn.cli", "report", f"{place}/runs", "-o", f"{place}/cwd/r.html"],
        env=environment(place), capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot write {place}/cwd/r.html (File too large): "
        "free some space, or choose a folder on another disk\n"
    )
    assert not list((place / "cwd").iterdir())


def test_names_that_are_no_text_and_a_working_folder_that_is_gone(place):
    command = [sys.executable, "-m", "verl_aqn.cli", "runs"]
    done = subprocess.run([*command, b"/tmp/\xff"], env=environment(place), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), "not UTF-8" in done.stderr) == (2, 1, True)
    (place / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", f'cd {place}/gone; rmdir {place}/gone; exec "$@"', "sh", *command],
        env=environment(place), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1,
        "error: the working directory does not exist any more: change to another one\n",
    )


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_a_command_with_its_own_code(place, number, name):
    """The command waits for a file that nobody writes."""
    (place / "source" / "train.jsonl").unlink()
    os.mkfifo(place / "source" / "train.jsonl")
    command = ["data", "gsm8k", "--source", str(place / "source"), "--dst", str(place / "cwd" / "d")]
    process = subprocess.Popen(
        [sys.executable, "-m", "verl_aqn.cli", *command], env=environment(place), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wchan = Path(f"/proc/{process.pid}/wchan")
    deadline = time.monotonic() + 120
    while wchan.read_text() not in ("wait_for_partner", "fifo_open") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, f"error: stopped by {name}\n")
    assert not list((place / "cwd").iterdir())


def test_libraries_write_into_the_cache_where_they_cannot_into_the_home_folder(place):
    code = "from verl_aqn.environment import keep_off_home; env = {'TRITON_HOME': 'x'}; keep_off_home(env); print(env)"
    for home, moved in (("home", set()), ("locked", {"HF_DATASETS_CACHE", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT"})):
        env = environment(place, HOME=f"{place}/{home}", VERL_AQN_CACHE="/cache")
        told = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, preexec_fn=as_a_user)
        found = ast.literal_eval(told.stdout.decode())
        assert found.pop("TRITON_HOME") == "x"
        assert moved <= set(found)
        assert bool(moved) == bool(found)


def test_the_example_of_the_documentation(place):
    """The example shows quoted values; it runs unchanged in a shell."""
    (text,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/environment.md").read_text(encoding="utf-8"), re.S)
    command = text.replace("verl-aqn", f"{sys.executable} -m verl_aqn.cli")
    done = subprocess.run(["bash", "-c", command], env=environment(place), capture_output=True, text=True)
    assert (done.returncode, len(json.loads(done.stdout))) == (0, 29), done.stderr


def test_what_an_empty_variable_means():
    env = dict.fromkeys(
        ("RAY_ADDRESS", "HOME", "XDG_CACHE_HOME", "VLLM_CPU_KVCACHE_SPACE", "VERL_AQN_CACHE", "TORCHINDUCTOR_CACHE_DIR",
         "WANDB_DIR", "CUDA_VISIBLE_DEVICES", "VLLM_PLUGINS", "MY_OWN", "http_proxy"), ""
    )  # fmt: skip
    drop_empty(env)
    assert set(env) == {"CUDA_VISIBLE_DEVICES", "VLLM_PLUGINS", "MY_OWN", "http_proxy"}


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("VERL_AQN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    usual = tmp_path / ".cache" / "verl-aqn"
    assert cache_dir() == usual
    for said in ("", "relative/folder"):  # as the standard says
        monkeypatch.setenv("XDG_CACHE_HOME", said)
        assert cache_dir() == usual
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "verl-aqn"
    monkeypatch.setenv("VERL_AQN_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("VERL_AQN_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", NO_HOME)
    with pytest.raises(EnvironmentFault, match="set VERL_AQN_CACHE"):
        cache_dir()
