"""A Ray cluster with two nodes: two network namespaces of this machine, each with its own address."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import TINY, leftovers, lines, newest
from verl_aqn.bench import letters
from verl_aqn.cluster import shared_disk

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]
LATE_S = 4  # after this time a node's view of the slow disk has a file of the other node
HEAD, WORKER = "10.77.31.1", "10.77.31.2"
# The names are this process's own: a session that was killed leaves its namespaces behind. 15 characters at most.
SPACES = {HEAD: f"aqn{os.getpid()}h", WORKER: f"aqn{os.getpid()}w"}


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"ip {' '.join(arguments)}: {done.stderr.strip()} (needs root, iproute2, and network namespaces)")
    return done.stdout


class Nodes:
    """The two namespaces, each with a home, a token and Ray's temporary folder, and the disk that they share."""

    def __init__(self, folder: Path, ray: Path):
        self.folder, self.ray, self.private, self.slow = folder, ray, folder / "private", folder / "slow"
        self.disks: list[subprocess.Popen] = []
        self.private.mkdir()
        self.slow.mkdir()
        for space in SPACES.values():
            ip("netns", "add", space)
            (folder / space / "disk").mkdir(parents=True)
        ends = [f"{space}-0" for space in SPACES.values()]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for (address, space), end in zip(SPACES.items(), ends, strict=True):
            ip("link", "set", end, "netns", space)
            ip("-n", space, "address", "add", f"{address}/24", "dev", end)
            for name in ("lo", end):
                ip("-n", space, "link", "set", name, "up")

    def start(self, address: str, *command: str, wait_s: float | None = None) -> subprocess.Popen:
        """Start a process as on that machine: its network, its home folder, and verl-aqn on the PATH."""
        space = SPACES[address]
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"HOME": str(self.folder / space), "VERL_AQN_CACHE": str(self.folder / "cache")}
        env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "WANDB_API_KEY": "planted-secret"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        env |= {shared_disk.LIMIT: str(wait_s)} if wait_s is not None else {}
        inside = ["ip", "netns", "exec", space, *command]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        # If a shell starts pytest in the background, pytest and its children ignore Ctrl-C.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(inside, env=env, text=True, cwd=ROOT, preexec_fn=heed, **pipes)

    def mount_slow_disk(self, **seconds: float) -> None:
        """Give each node its own slow view of one folder, at `slow`. Processes that run already do not see it."""
        (self.folder / "behind").mkdir()
        for space in SPACES.values():
            place = self.folder / space / "disk"
            options = [f"--{name}={value}" for name, value in seconds.items()]
            command = [
                sys.executable,
                "-m",
                "tests.helpers.slow_disk",
                str(self.folder / "behind"),
                str(place),
                *options,
            ]
            disk = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.disks.append(disk)
            while not place.is_mount():
                assert disk.poll() is None, disk.stdout.read()
                time.sleep(0.05)

    def at_slow_disk(self, address: str) -> str:
        """Return the shell command that shows a node's processes its view of the slow disk."""
        return f"mount --bind {self.folder / SPACES[address] / 'disk'} {self.slow}"

    def ray_start(self, address: str, *arguments: str) -> str:
        """Run `ray start` for a node.

        For this node's processes, a separate disk is mounted over the folder `private` (`ip` also gives them their own
        mounts).
        """
        mounts = f"mount -t tmpfs aqn {self.private} && {self.at_slow_disk(address)}"
        script = f'{mounts} && exec bash scripts/ray_start.sh "$@"'
        options = ["--profile", "cpu", "--temp-dir", str(self.ray / SPACES[address])]
        process = self.start(address, "bash", "-c", script, "ray_start", *arguments, *options)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0, out
        return out

    def token(self, address: str) -> Path:
        return self.folder / SPACES[address] / ".ray" / "auth_token"

    def processes(self, address: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", SPACES[address]).split()]

    def listening(self, address: str) -> set[tuple[str, int]]:
        """Return address and port of every listening TCP socket of that node."""
        out = ip("netns", "exec", SPACES[address], "ss", "-H", "-ltn")
        places = [line.split()[3].rpartition(":") for line in out.splitlines()]
        return {(place.strip("[]").removeprefix("::ffff:"), int(port)) for place, _, port in places}

    def end(self) -> None:
        for space in SPACES.values():
            for send in (signal.SIGTERM, signal.SIGKILL):
                processes = [psutil.Process(int(pid)) for pid in ip("netns", "pids", space).split()]
                for process in processes:
                    process.send_signal(send)
                psutil.wait_procs(processes, timeout=10)
            ip("netns", "delete", space)
        for disk in self.disks:
            disk.terminate()
            disk.wait(timeout=20)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    # Ray's sockets are under its temporary folder, and their paths end at 107 characters.
    ray = Path(f"/tmp/r{os.getpid()}")
    ray.mkdir()
    made = Nodes(tmp_path_factory.mktemp("nodes"), ray)
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(ray)


@pytest.fixture(scope="module")
def cluster(nodes):
    nodes.mount_slow_disk(delay=0.005, late=LATE_S)
    out = nodes.ray_start(HEAD, "head", "--address", HEAD)
    assert f"ray_start.sh worker {HEAD}:6379" in out
    assert nodes.token(HEAD).stat().st_mode & 0o777 == 0o600
    refused = nodes.start(WORKER, "bash", "scripts/ray_start.sh", "worker", f"{HEAD}:6379", "--profile", "cpu")
    assert "error: no token in" in refused.communicate(timeout=60)[0]
    assert refused.returncode == 1
    nodes.token(WORKER).parent.mkdir(mode=0o700)
    nodes.token(WORKER).write_text(nodes.token(HEAD).read_text())
    nodes.token(WORKER).chmod(0o600)
    nodes.ray_start(WORKER, "worker", f"{HEAD}:6379")
    return nodes


def ask(nodes: Nodes, address: str, code: str) -> tuple[int, str]:
    """Return exit code and output of Python on that node."""
    process = nodes.start(address, sys.executable, "-c", code)
    out = process.communicate(timeout=240)[0]
    return process.returncode, out


def test_who_has_not_the_token_gets_no_answer(cluster):
    other = f"import os; os.environ.update(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN='{'0' * 64}')"
    code, out = ask(cluster, WORKER, f"{other}; import ray; ray.init('{HEAD}:6379')")
    assert code != 0
    assert "uthenticat" in out
    # The dashboard, which takes jobs.
    code, out = ask(
        cluster, HEAD, "import urllib.request as u; u.urlopen('http://127.0.0.1:8265/api/jobs/', timeout=20)"
    )
    assert code != 0
    assert "401" in out


def test_nothing_listens_beyond_what_the_nodes_need(cluster):
    """Ray binds a node's servers to all of its addresses. All except its metrics require the token."""
    for address in (HEAD, WORKER):
        listening = cluster.listening(address)
        assert {place for place, port in listening if port == 8265} <= {"127.0.0.1"}
        assert {place for place, _ in listening} <= {"127.0.0.1", address, "*", "0.0.0.0"}
    assert (HEAD, 8265) not in cluster.listening(HEAD)


@pytest.fixture(scope="module")
def run(cluster, tiny_model, tmp_path_factory) -> Path:
    """Folder of a run of three steps on both nodes."""
    base, before = tmp_path_factory.mktemp("shared"), leftovers()
    places = [f"actor_rollout_ref.model.path={tiny_model}", f"aqn.run.dir={base}"]
    module = f"reward.custom_reward_function.path=pkg://{letters.__name__}"  # as recipes name theirs
    submit = ["bash", "scripts/ray_submit.sh", "e12_aggressive_1ep", *TINY, *places, module, "trainer.nnodes=2"]
    process = cluster.start(HEAD, *submit)
    out = process.communicate(timeout=1500)[0]
    log = newest(base) / "training.log" if (base / "training.log").exists() else None
    assert process.returncode == 0, out + (log.read_text()[-3000:] if log else "")
    (newest(base) / "submitted.txt").write_text(out)
    assert leftovers() <= before
    for address in SPACES:
        left = [psutil.Process(pid) for pid in cluster.processes(address)]
        assert not [one for one in left if "VERL_AQN_TEMPORARY" in one.environ()]
    return newest(base)


def test_both_nodes_take_part_and_hold_the_same(run):
    nodes = {record["address"]: record for record in lines(run / "evidence.jsonl", "node")}
    assert set(nodes) == {HEAD, WORKER}
    (placed,) = lines(run / "evidence.jsonl", "placed")
    assert set(placed["actor_nodes"]) == set(placed["rollout_nodes"]) == {HEAD, WORKER}
    for record in lines(run / "evidence.jsonl", "base"):
        assert len(record["actor"]) == len(record["rollout"]) == 2
        assert {*record["actor"], *(answer["base_digest"] for answer in record["rollout"])} == {record["disk"]}
    for record in lines(run / "evidence.jsonl", "adapter"):
        assert [(answer["adapter_digest"], answer["ranks"]) for answer in record["actual"]] == [
            (record["sent"], [0, 1])
        ]
    noise = lines(run / "evidence.jsonl", "noise")
    assert [record["ranks"] for record in noise] == [[0, 1]] * 3  # equal in both replicas, in every step


def test_the_run_is_whole_and_was_followed(run):
    steps = lines(run / "metrics.jsonl", "step")
    assert [step["metrics"]["aqn/sigma"] for step in steps] == [0.0, 0.05, 1e-5]
    assert all(step["metrics"]["actor/grad_norm"] > 0 for step in steps)
    assert len(list((run / "checkpoints" / "global_step_3" / "actor").glob("model_world_size_2_rank_*.pt"))) == 2
    text = (run / "submitted.txt").read_text()
    assert "step 3/3" in text
    assert "follow it again" in text
    assert "not sent" in text
    assert "WANDB_API_KEY" in text


def test_no_secret_is_on_record(run, cluster):
    token = cluster.token(HEAD).read_bytes()
    for file in (path for path in run.rglob("*") if path.is_file()):
        assert token not in file.read_bytes(), file
        assert b"planted-secret" not in file.read_bytes(), file


def test_a_run_folder_that_is_not_shared_is_refused_in_a_line(cluster, tiny_model):
    places = [f"actor_rollout_ref.model.path={tiny_model}", f"aqn.run.dir={cluster.private / 'runs'}"]
    submit = ["bash", "scripts/ray_submit.sh", "e12_aggressive_1ep", *TINY, *places, "trainer.nnodes=2"]
    process = cluster.start(HEAD, *submit, wait_s=2)
    out = " ".join(process.communicate(timeout=400)[0].split())
    assert process.returncode == 1
    assert f"node {WORKER} has no {cluster.private}" in out
    assert "put aqn.run.dir, VERL_AQN_CACHE, model and data on a disk that all nodes share" in out
    assert "if the disk is shared and only slow, set VERL_AQN_DISK_WAIT_S to more than 2" in out


def test_files_that_a_shared_disk_shows_late_are_waited_for(cluster, tiny_model):
    """Each node does with a slow disk what a run does with the disk that they share."""
    token = f"export RAY_AUTH_MODE=token RAY_ADDRESS={HEAD}:6379"
    script = f'{cluster.at_slow_disk(HEAD)} && {token} && exec "$@"'
    command = [sys.executable, "-m", "tests.integration.late_disk", str(cluster.slow / "base"), str(tiny_model)]
    process = cluster.start(HEAD, "bash", "-c", script, "late_disk", *command)
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    told = json.loads(out.splitlines()[-1])
    assert told["address"] == WORKER
    assert told["stacks"]  # its environment, which it has from the run folder
    assert sorted(told["nodes"]) == [HEAD, WORKER]
    assert told["seconds"] >= LATE_S  # the head's note
    assert (told["before"], told["after"]) == (0, 1)
    (warning,) = told["warnings"]
    assert f"the disk of {cluster.slow}" in warning
    assert f"has no locks between nodes (seen from {WORKER})" in warning


def test_stacks_come_from_all_nodes_and_ctrl_c_asks_and_then_stops_the_job_on_them(cluster, tiny_model, tmp_path):
    before = leftovers()
    places = [f"actor_rollout_ref.model.path={tiny_model}", f"aqn.run.dir={tmp_path}"]
    long = ["data.train_max_samples=64", "trainer.total_training_steps=32"]  # it is still at work when it is stopped
    submit = ["bash", "scripts/ray_submit.sh", "e12_aggressive_1ep", *TINY, *places, *long, "trainer.nnodes=2"]
    process = cluster.start(HEAD, *submit)
    for line in process.stdout:
        if "rollout ready" in line:
            break
    (temporary,) = (one["path"] for one in lines(newest(tmp_path) / "events.jsonl", "temporary"))
    with_token = f"import os; os.environ.update(RAY_AUTH_MODE='token', RAY_ADDRESS='{HEAD}:6379')"
    code, out = ask(
        cluster,
        HEAD,
        f"{with_token}; from verl_aqn.integrations.verl.cluster_nodes import main; main('stacks', '', {temporary!r})",
    )
    assert code == 0, out
    told = {text.split()[0]: text for text in out.split("==== node ")[1:]}
    assert set(told) == {HEAD, WORKER}
    for text in told.values():
        assert "ray::WorkerDict" in text
        assert "VLLM::Worker" in text
        assert "most recent call first" in text
    process.send_signal(signal.SIGINT)
    out = process.communicate("y\n", timeout=300)[0]
    assert "Otherwise it goes on. [y/N]" in out
    assert "stopped" in out
    assert process.returncode == 130
    assert json.loads((newest(tmp_path) / "state.json").read_text())["status"] == "interrupted"
    assert leftovers() <= before
    for address in SPACES:
        left = [psutil.Process(pid) for pid in cluster.processes(address)]
        assert not [one for one in left if "VERL_AQN_TEMPORARY" in one.environ()]
