"""Processes forked from one that has imported verl, torch and vLLM behave as started by `python`."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from verl.trainer.main_ppo import run_ppo

from verl_aqn.cluster.process_environment import starts_warm
from verl_aqn.config.compose import load_recipe
from verl_aqn.launch.forkserver.ahead import Ahead, ahead_of
from verl_aqn.launch.forkserver.server import ENDS, FIRST, PYTHON, THEN, warm_python

TELL = """
import json, os, random, sys, numpy
print(json.dumps([os.getpid(), os.getcwd(), sys.argv, os.environ.get("OWN"), os.environ["VLLM_LOGGING_LEVEL"],
    "verl" in sys.modules, __name__, numpy.random.random(), random.random(), os.environ.get("GONE")]))
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A server, and the replacement for Python that connects to it."""
    folder = tmp_path_factory.mktemp("zygote")
    python, server = warm_python(str(folder))
    env = {**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", PYTHON: str(python), "GONE": "here"}
    env.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # as in supervise.environment; otherwise it would be an argument of spawned processes
    command = [sys.executable, "-m", "verl_aqn.launch.forkserver.server", str(server)]
    # A session of its own, as `supervise` starts it: a process that ends its group must not end this pytest.
    with subprocess.Popen(command, env=env, start_new_session=True) as process:
        while not server.exists():
            assert process.poll() is None
            time.sleep(0.1)
        env.pop("GONE")
        yield python, process.pid, env
        process.terminate()


@pytest.fixture
def run(warm, tmp_path):
    """Call the replacement for Python as Ray does, with a worker that runs this code."""
    python, _, env = warm
    script = tmp_path / "default_worker.py"

    def call(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        script.write_text(code)
        options = {"env": env, "capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run([python, script, *arguments], check=False, **options)

    return call


def test_a_forked_process_has_the_arguments_environment_folder_and_files_of_its_client(warm, run, tmp_path):
    _, server, env = warm
    reader, writer = os.pipe()
    code = TELL + "import psutil; print(psutil.Process().ppid()); os.write(int(sys.argv[2]), b'word')"
    done = run(code, "one", str(writer), cwd=tmp_path, env={**env, "OWN": "mine"}, pass_fds=[writer])
    assert done.returncode == 0, done.stderr
    told, parent = done.stdout.splitlines()
    _, folder, arguments, own, level, imported, name, _, _, gone = json.loads(told)
    script = str(tmp_path / "default_worker.py")
    assert (folder, arguments, own) == (str(tmp_path), [script, "one", str(writer)], "mine")
    assert (imported, name, gone, int(parent)) == (True, "__main__", None, server)
    assert level == "WARN"  # verl's variables for Ray workers
    assert os.read(reader, 10) == b"word"
    os.close(reader)
    os.close(writer)


def test_a_forked_process_has_a_group_of_its_own(warm, run):
    """If a Ray worker dies, the raylet ends its process group: this must not include the server or other workers."""
    done = run("import os; print(os.getpid(), os.getpgid(0), flush=True); os.killpg(0, 9)")
    pid, group = done.stdout.split()
    assert (pid, done.returncode) == (group, -signal.SIGKILL), done.stderr
    assert run("print(1)").stdout.strip() == "1"


def test_what_gains_nothing_is_an_ordinary_python(warm):
    python, _, env = warm
    code = "import os, sys; print(os.getppid(), 'torch' in sys.modules)"
    done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(os.getpid()), "False"]


def test_random_numbers_and_ids_differ_between_forked_processes(run):
    """This includes the ids that Ray draws in C++: two workers with one id end each other."""
    ids = "; ".join(f"print(ray.{kind}.from_random().hex())" for kind in ("ObjectID", "WorkerID", "NodeID"))
    told = [run(TELL + f"import ray; {ids}").stdout.splitlines() for _ in range(2)]
    assert json.loads(told[0][0])[7] != json.loads(told[1][0])[7]
    assert json.loads(told[0][0])[8] != json.loads(told[1][0])[8]
    assert len({*told[0][1:], *told[1][1:]}) == 6


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", -15), ("1/0", 1)])
def test_the_client_ends_as_the_process_does(warm, run, end, status):
    done = run(f"import os, sys; print(os.getpid(), flush=True); {end}")
    assert done.returncode == status
    *_, last = (json.loads(line) for line in warm[0].with_name(ENDS).read_text().splitlines())
    assert (last["pid"], last["status"]) == (int(done.stdout), status)
    assert ("ZeroDivisionError" in done.stderr) == (end == "1/0")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_to_the_client_reaches_the_process(warm, tmp_path, number, status):
    python, _, env = warm
    script = tmp_path / "default_worker.py"
    script.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    with subprocess.Popen([python, script], env=env, stdout=subprocess.PIPE, text=True) as client:
        process = psutil.Process(int(client.stdout.readline()))
        assert process.pid != client.pid
        client.send_signal(number)
        assert client.wait(60) == status
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running()


def test_a_process_that_multiprocessing_spawns_from_a_forked_one_is_forked_too(warm, run, tmp_path):
    module = tmp_path / "worker_of_this_test.py"
    module.write_text("import os, sys\ndef work(queue): queue.put([os.getppid(), 'verl' in sys.modules])\n")
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {str(tmp_path)!r})
import worker_of_this_test
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=worker_of_this_test.work, args=(queue,))
    process.start()
    print(*queue.get(timeout=60))
    process.join()
    print(process.exitcode)
"""
    done = run(code)
    assert done.stdout.split() == [str(warm[1]), "True", "0"], done.stderr


@pytest.mark.parametrize("by", ["ray._raylet", "setproctitle"])  # as Ray's and vLLM's processes do
def test_a_forked_process_can_give_itself_a_title(run, by):
    title = "ray::agent_loop_worker_0_f925dd7d:AgentLoopWorkerTQ.__init__"  # the longest of a run
    code = f"import psutil, ray, setproctitle; {by}.setproctitle({title!r}); print(*psutil.Process().cmdline())"
    done = run(code)
    assert done.stdout.strip() == title, done.stderr


@pytest.mark.parametrize(
    ("override", "warm_start"),
    [
        ("aqn.seed=1", True),
        ("actor_rollout_ref.rollout.full_determinism=true", False),
        ("trainer.logger=[console,rl_insight]", False),
        ("ray_kwargs.timeline_json_file=somewhere.json", False),
        ("ray_kwargs.ray_init.runtime_env.py_executable=python3", False),
        ("+ray_kwargs.ray_init.runtime_env.env_vars.OMP_NUM_THREADS='1'", False),  # torch reads it once
        ("+ray_kwargs.ray_init.address=10.0.0.1:6379", False),
        ("profile=cuda", False),
    ],
)
def test_what_verl_s_own_start_does_beside_starting_ray_is_left_to_it(override, warm_start):
    assert starts_warm(load_recipe("e12", ["profile=cpu", override])) is warm_start


def test_verl_s_start_reads_nothing_of_the_config_that_ours_does_not_know():
    read = {key.removesuffix(".get") for key in re.findall(r"\bconfig\.([\w.]+)", inspect.getsource(run_ppo))}
    assert read == {
        "actor_rollout_ref.rollout", "reward.reward_model.rollout", "reward.reward_model.enable", "trainer",
        "ray_kwargs", "transfer_queue.enable",
        # Only with CUDA:
        "global_profiler.tool", "global_profiler", "global_profiler.global_tool_config.nsys.controller_nsight_options",
    }  # fmt: skip


def test_ray_is_imported_with_the_environment_of_a_worker_and_most_of_the_rest_before():
    """Otherwise the server would not import the remaining modules for its first worker, as it does if Ray is absent."""
    code = f"""
import importlib, sys
from verl_aqn.launch.forkserver import server
missing = [name for name in {FIRST + THEN!r} if importlib.util.find_spec(name) is None]
server.preload(server.FIRST)
first, ray = set(sys.modules), "ray" in sys.modules
server.preload(server.THEN)
print(missing, ray, len(first) / len(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "VERL_PLATFORM": "cpu"},
    )
    missing, ray, share = done.stdout.split("\n")[-2].rsplit(maxsplit=2)
    assert (missing, ray) == ("[]", "False")
    assert float(share) > 0.75


def test_without_a_server_it_is_an_ordinary_python(tmp_path):
    python, _ = warm_python(str(tmp_path))
    script = tmp_path / "default_worker.py"
    script.write_text("print(6 * 7)")
    done = subprocess.run([python, script], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_a_server_that_was_started_ahead_of_its_run_has_the_environment_and_the_log_of_the_run(tmp_path, monkeypatch):
    """Its clients may ask before its imports have finished."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    early = {**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "GONE": "here"}
    script, log = tmp_path / "default_worker.py", tmp_path / "training.log"
    script.write_text("import tempfile; print(tempfile.gettempdir(), flush=True)\n" + TELL)
    python, server = warm_python(str(tmp_path))
    env = {**early, PYTHON: str(python), "TMPDIR": str(tmp_path)}
    env.pop("GONE")
    with Ahead(early) as ahead:
        os.write(ahead._said.fileno(), b"a warning of an import\n")
        assert ahead.hand_over(server, env, log)
        os.write(ahead._said.fileno(), b"another, while it still imports\n")
        assert not ahead.hand_over(server, env, log), "it serves one run"
        done = subprocess.run([python, script], env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr + log.read_text()
        folder, told = done.stdout.splitlines()
        assert (folder, json.loads(told)[-1]) == (str(tmp_path), None), done.stderr
        assert json.loads(told)[5], "verl is imported"
        assert "a warning of an import\nanother, while it still imports" in log.read_text()
        assert len((tmp_path / ENDS).read_text().splitlines()) == 1
    assert ahead.process.poll() is None, "it belongs to the run now"
    ahead.process.terminate()
    assert ahead.process.wait() == -signal.SIGTERM


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """`ask(ahead, code, …)`: what a fork of the server answers that runs a module with this code."""
    monkeypatch.chdir(tmp_path)

    def call(ahead: Ahead, code: str, *arguments: str, timeout: float = 200, **environment: str):
        (tmp_path / "question.py").write_text(code)
        env = {**os.environ, **environment, "PYTHONPATH": str(tmp_path)}
        return ahead.run_module(["-m", "question", *arguments], "a text: §", env, timeout)

    return call


ASKED = """
import json, os, sys
print(json.dumps([__name__, sys.argv[1:], sys.stdin.read(), os.environ["OWN"], os.environ.get("GONE"), os.getppid(),
    "vllm" in sys.modules, os.getcwd()]))
print("to the other stream", file=sys.stderr)
sys.exit(3)
"""


def test_questions_run_in_forks_of_a_server_without_a_run_which_serves_the_run_afterwards(ask, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    early = {**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "GONE": "here", "PYTHONPATH": str(tmp_path)}
    python, server = warm_python(str(tmp_path))
    with Ahead(early) as ahead:
        for _ in range(2):
            done = ask(ahead, ASKED, "one", "two", OWN="mine")
            assert (done.returncode, done.stderr) == (3, "to the other stream\n")
            told = json.loads(done.stdout)
            assert told == [
                "__main__",
                ["one", "two"],
                "a text: §",
                "mine",
                None,
                ahead.process.pid,
                True,
                str(tmp_path),
            ]
        assert ask(ahead, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
        with pytest.raises(subprocess.TimeoutExpired):
            ask(ahead, "import time; time.sleep(100)", timeout=1)
        assert not psutil.Process(ahead.process.pid).children(), "a question without an answer in time is ended"
        assert ahead.hand_over(server, {**early, PYTHON: str(python), "TMPDIR": str(tmp_path)}, tmp_path / "log")
        alone = json.loads(ask(ahead, ASKED, OWN="mine").stdout)
        assert alone[5:7] == [os.getpid(), False], "it has a run now, so this is an ordinary process"
    ahead.process.terminate()
    ahead.process.wait()


def test_a_question_is_answered_where_the_server_has_died_and_ends_with_it(ask, tmp_path):
    with Ahead({**os.environ, "VERL_PLATFORM": "cpu"}) as ahead:
        ahead.process.kill()
        ahead.process.wait()
        assert json.loads(ask(ahead, ASKED, OWN="mine").stdout)[5] == os.getpid()
    with Ahead({**os.environ, "VERL_PLATFORM": "cpu", "PYTHONPATH": str(tmp_path)}) as ahead:
        kills = "import os, time; print(os.getpid(), flush=True); os.kill(os.getppid(), 9); time.sleep(100)"
        began = time.monotonic()
        done = ask(ahead, kills)
        assert done.returncode == -signal.SIGKILL
        while psutil.pid_exists(int(done.stdout)):
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        assert not ahead.hand_over(tmp_path / "zygote", {}, tmp_path / "log")


def test_the_forked_processes_of_a_run_have_the_allocator_of_ray(monkeypatch):
    """It is loaded when a program starts, so a server that is started without it can give it to no process."""
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with ahead_of(load_recipe("e12_aggressive_1ep", ["profile=cpu"])) as ahead:
        assert ahead.wait()
        assert "libjemalloc" in Path(f"/proc/{ahead.process.pid}/maps").read_text()


def test_a_server_without_a_run_ends_with_its_parent_or_at_once(tmp_path):
    with Ahead({**os.environ, "VERL_PLATFORM": "cpu"}) as ahead:
        pass
    assert ahead.process.poll() == -signal.SIGTERM
    with Ahead({**os.environ, "VERL_PLATFORM": "cpu"}) as ahead:
        ahead.process.kill()
        ahead.process.wait()
        ahead.wait()
        assert not ahead.hand_over(tmp_path / "zygote", {}, tmp_path / "log"), "the run starts a server of its own"
