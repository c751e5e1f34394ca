"""One tiny random model, made once, and runs through the command line as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers import warm
from tests.helpers.leftovers import Leftovers
from verl_aqn.bench import letters
from verl_aqn.cache import cache_dir
from verl_aqn.runs.judge.base_record import check_base, sentence
from verl_aqn.runs.judge.ranks import wide_base

# Sizes of a run that takes a minute and a half. The reward has variance for a model that knows nothing.
TINY = [
    "profile=cpu",
    f"reward.custom_reward_function.path={letters.__file__}",
    "data.train_batch_size=2",
    "data.train_max_samples=16",
    "data.val_max_samples=4",
    "data.max_response_length=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",  # with warm-up the first update has learning rate 0
    "reward.reward_kwargs.overlong_buffer_cfg.len=4",
    # E12's dynamic sampling with a metric that always varies: its code runs, but no group is discarded.
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.metric=score",
    "trainer.total_training_steps=3",
    "trainer.save_freq=1",
    "aqn.noise.num_stages=3",
    "aqn.noise.probe=false",  # seconds that one run of test_run.py takes for all
]


Process = subprocess.Popen | warm.Command

_left: Leftovers | None = None


@pytest.fixture(scope="session", autouse=True)
def own_traces(tmp_path_factory) -> Iterator[None]:
    """Follow from the start of the session what its runs make; start the process that most of them are forked from."""
    global _left
    temporary = Path("/tmp")
    patterns = [(Path("/dev/shm"), "*"), (temporary, "aqn-*"), (temporary, "????????-????-????-*")]
    _left = Leftovers(patterns, tmp_path_factory.getbasetemp())
    _left.start()
    _left.expect(warm.shared().process.pid)
    yield
    _left.stop()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    from verl_aqn.tasks.smollm2 import tiny_model

    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory) -> Path:
    """A cache with code that is compiled once for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def train(tiny_model, warm_cache):
    """`train(run_dir, *overrides, recipe=…, new=…)` → a started `verl-aqn train` process."""

    def start(run_dir: Path, *overrides: str, recipe: str = "e12_aggressive_1ep", new: bool = False) -> Process:
        places = [f"actor_rollout_ref.model.path={tiny_model}", f"aqn.run.dir={run_dir}"]
        return verl_aqn("train", recipe, *TINY, *places, *overrides, cache=warm_cache, new=new)

    return start


def verl_aqn(*arguments: str, cache: Path | None = None, new: bool = False) -> Process:
    """Run the command, `new`ly imported as a user would, or in a fork of a process that has its imports."""
    env = {**os.environ, **({"VERL_AQN_CACHE": str(cache)} if cache else {})}
    if not new and warm.shared().fits(env):
        return warm.shared().start(arguments, env)
    command = [sys.executable, "-m", "verl_aqn.cli", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ask_vllm(module: str, *arguments, **variables: str) -> dict:
    """Return the JSON line that `python -m tests.integration.<module> ARGUMENTS`, a separate engine, prints."""
    result = start_engine(module, *arguments, **variables)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def start_engine(module: str, *arguments, **variables: str) -> subprocess.CompletedProcess:
    """Do the same for a module that prints nothing."""
    env = {**os.environ, "VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    # The engine runs in the calling process, which takes half the time.
    env |= variables | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir() / "torchinductor"),
    }
    # vLLM leaves sockets behind. pytest's own folders are too deep for a socket's path of 107 characters.
    with tempfile.TemporaryDirectory(prefix="aqn-") as sockets:
        return subprocess.run(
            [sys.executable, "-m", f"tests.integration.{module}", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=env | {"TMPDIR": sockets},
            timeout=400,
            check=False,
        )


def finish(process: Process, base: Path) -> tuple[Path, str]:
    """Wait for the newest run of `base` to finish without error; return its folder and standard error."""
    _, err = process.communicate(timeout=800)
    run, log = newest(base), base / "training.log"
    assert process.returncode == 0, err + (log.read_text()[-3000:] if log.exists() else "")
    return run, err


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def kill(process: Process) -> None:
    """Kill a run with all processes that it started, like a power cut."""
    for victim in [psutil.Process(process.pid), *descendants(process.pid)]:
        with suppress(ProcessLookupError):  # it ended together with another process
            os.kill(victim.pid, signal.SIGKILL)
    process.communicate()


def leftovers() -> set[str]:
    """Return the processes, shared memory, sockets and folders that runs of this pytest have left until now."""
    assert _left is not None
    return _left.found()


def newest(run_dir: Path) -> Path:
    """Return the folder of the newest run."""
    return (run_dir / "training.log").resolve().parent


def lines(path: Path, kind: str | None = None) -> list[dict]:
    """Return complete lines of a JSON-lines file; records of the base get one entry for every rank."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    found = [record for record in records if kind is None or record["kind"] == kind]
    return [wide_base(record) if record.get("kind") == "base" else record for record in found]


def compared(run: Path) -> tuple[str, dict]:
    """Return what a run compared of its base at start and end, judged again, and the record of the start."""
    start, end = lines(run / "evidence.jsonl", "base")
    check_base(start, None)
    check_base(end, start)
    assert sentence(start) == sentence(end)
    assert end["files"]["read"] == "at the start"
    assert sum(start["expected"].values()) == start["files"]["tensors"]
    return sentence(start), start


def lines_of(base: Path) -> list[dict]:
    """Return the events so far of the only run under `base`."""
    found = list(base.glob("runs/*/events.jsonl"))
    return lines(found[0]) if found else []
