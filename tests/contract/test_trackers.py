"""verl's own `Tracking` with the real packages: values are read back, and nothing is written or sent elsewhere."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from verl_aqn.config.trackers import stay_here

BACKENDS = ["tensorboard", "wandb", "mlflow", "swanlab", "trackio", "file"]
LOGGED = {
    1: {"aqn/sigma": 0.05, "aqn/mismatch/kl_per_token": 1e-6, "aqn/validation/math_verify": 0.5},
    2: {"aqn/sigma": 1e-5, "aqn/mismatch/kl_per_token": 2e-6, "val-core/openai/gsm8k/acc/mean@1": 0.75},
}
PACKAGES = Path(sys.prefix) / "trackers"  # scripts/setup.sh

# Log as a run does: the whole config, numbers, and the tables of verl.
WRITE = """
import json, sys
sys.path.append(sys.argv[1])
def heard(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and not args[1][0].startswith(("127.", "::1")):
        print("connects to", args[1], file=sys.stderr, flush=True)
        raise PermissionError("no network here")
sys.addaudithook(heard)
from omegaconf import OmegaConf
from verl.utils.tracking import DapoFilteredRewardTableLogger, Tracking, ValidationGenerationsLogger
from verl_aqn.config.compose import load_recipe
backends, logged = json.loads(sys.argv[2]), json.loads(sys.argv[3])
config = OmegaConf.to_container(load_recipe("e12", ["profile=cpu"]), resolve=True)
tracking = Tracking("verl-aqn", "e12", backends, config=config)
for step, metrics in logged.items():
    tracking.log(metrics, int(step))
    ValidationGenerationsLogger("verl-aqn", "e12").log(backends, [("question", "#### 7", 1.0)], int(step))
    DapoFilteredRewardTableLogger("verl-aqn", "e12").log(backends, {0.0: 3}, int(step))
tracking.finish()
"""

# Each backend's own reader, or its documented format: {name: {step: value}}.
READ = """
import json, logging, sqlite3, struct, sys
from pathlib import Path
sys.path.append(sys.argv[1])
run, names = Path(sys.argv[2]), json.loads(sys.argv[3])

def tensorboard():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    return {name: {one.step: one.value for one in found.Scalars(name)} for name in found.Tags()["scalars"]}

def records(data):
    at, parts = 7, b""  # LevelDB's log: blocks of 32 KiB, checksum, length and kind (1 whole, 2 first, 3, 4 last)
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        parts, at = parts + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""

def wandb():
    from wandb.proto import wandb_internal_pb2
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in names & items.keys():
            found.setdefault(name, {})[items["_step"]] = items[name]
    return found

def mlflow():
    from mlflow import MlflowClient
    client = MlflowClient((run / "mlflow").as_uri())
    (one,) = client.search_runs([client.get_experiment_by_name("verl-aqn").experiment_id])
    assert one.data.params["aqn/noise/sigma_start"] == "0.05", one.data.params
    assert len(client.list_artifacts(one.info.run_id)) == 2
    history = lambda name: client.get_metric_history(one.info.run_id, name)
    return {name: {metric.step: metric.value for metric in history(name)} for name in one.data.metrics}

def swanlab():
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader
    (file,) = run.glob("swanlab/run-*/run-*.swanlab")
    reader, found = DataStoreReader(), {}
    reader.open(file)
    while data := reader.scan():
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "scalar":
            found.setdefault(record.scalar.key, {})[record.scalar.step] = record.scalar.value.number
    return found

def trackio():
    from trackio.sqlite_storage import SQLiteStorage
    found = {}
    for row in SQLiteStorage.get_logs("verl-aqn", "e12"):
        for name in names & row.keys():
            found.setdefault(name, {})[row["step"]] = row[name]
    return found

def file():
    found = {}
    for line in (run / "tracked-1.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row["data"].items():
            found.setdefault(name, {})[row["step"]] = value
    return found

names = set(names)
json.dump({read.__name__: read() for read in (tensorboard, wandb, mlflow, swanlab, trackio, file)}, sys.stdout)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, records of each backend). A run may write to run/ and cache/, but not to home/ and cwd/."""
    if not PACKAGES.is_dir():
        pytest.skip(f"no trackers in {PACKAGES}: scripts/setup.sh installs them for the profile cpu")
    folder = tmp_path_factory.mktemp("trackers")
    for name in ("run", "home", "cwd", "tmp", "cache"):
        (folder / name).mkdir()
    # As in an activated environment, in which swanlab finds uv.
    env = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
    }
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1", "VERL_PLATFORM": "cpu"}
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as proxy:
        patch.setenv("VERL_AQN_CACHE", str(folder / "cache"))
        stay_here(env, folder / "run", 1)
        # Every HTTP client, in Python or not, must use this proxy.
        proxies = dict.fromkeys(
            ("http_proxy", "https_proxy", "all_proxy"), f"http://127.0.0.1:{proxy.getsockname()[1]}"
        )
        env |= proxies | {name.upper(): value for name, value in proxies.items()}
        listener = threading.Thread(target=_hear, args=(proxy, folder / "asked.txt"), daemon=True)
        listener.start()
        logged = json.dumps(LOGGED)
        done = _python(WRITE, PACKAGES, json.dumps(BACKENDS), logged, env=env, cwd=folder / "cwd")
        (folder / "said.txt").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, done.stderr[-3000:]
    names = json.dumps(sorted({name for metrics in LOGGED.values() for name in metrics}))
    read = _python(READ, PACKAGES, folder / "run", names, env=env, cwd=folder / "cwd")
    assert read.returncode == 0, read.stderr[-3000:]
    return folder, json.loads(read.stdout)


def _python(code, *arguments, env, cwd):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def _hear(proxy, file):
    while True:
        try:
            connection, _ = proxy.accept()
        except OSError:  # closed, because the test is over
            return
        with connection, file.open("ab") as out:
            out.write(connection.recv(200))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_value_is_read_back_under_its_name(written, backend):
    _, found = written
    wanted = {}
    for step, metrics in LOGGED.items():
        for name, value in metrics.items():
            name = name.replace("@", "_at_") if backend == "mlflow" else name  # its metric names cannot contain @
            wanted.setdefault(name, {})[str(step)] = pytest.approx(value, rel=1e-6)  # TensorBoard stores fp32
    assert {name: found[backend].get(name) for name in wanted} == wanted


def test_nothing_is_written_outside_the_run_folder_and_the_cache(written):
    folder, _ = written
    elsewhere = [path for name in ("home", "cwd") for path in (folder / name).rglob("*") if path.is_file()]
    assert not elsewhere
    assert {path.name for path in (folder / "run").iterdir()} == {
        "tensorboard", "wandb", "mlflow", "swanlab", "trackio", "tracked-1.jsonl",
    }  # fmt: skip


def test_nothing_asks_for_the_network(written):
    folder, _ = written
    assert not (folder / "asked.txt").exists(), (folder / "asked.txt").read_text()
    assert "connects to" not in (folder / "said.txt").read_text()


PLACES = (
    "WANDB_DIR", "MLFLOW_TRACKING_URI", "SWANLAB_LOG_DIR", "TRACKIO_DIR", "TENSORBOARD_DIR", "VERL_FILE_LOGGER_PATH",
)  # fmt: skip


def test_every_place_is_in_the_run_s_folder(tmp_path):
    stay_here(env := {}, tmp_path, 2)
    assert all(str(tmp_path) in env[name] for name in PLACES)
    assert env["TENSORBOARD_DIR"] == str(tmp_path / "tensorboard")
    assert env["VERL_FILE_LOGGER_PATH"] == str(tmp_path / "tracked-2.jsonl")


def test_what_the_user_has_set_stays(tmp_path):
    stay_here(all_of_them := {}, tmp_path, 1)
    user = dict.fromkeys(all_of_them, "the user's")
    stay_here(env := dict(user), tmp_path, 1)
    assert env == user
    stay_here(env := {"VERL_FILE_LOGGER_ROOT": "there"}, tmp_path, 1)
    assert "VERL_FILE_LOGGER_PATH" not in env  # verl would use it instead of the root


def test_keys_are_used_only_online(tmp_path):
    stay_here(env := {"SWANLAB_API_KEY": "key"}, tmp_path, 1)
    assert "SWANLAB_API_KEY" not in env
    stay_here(env := {"SWANLAB_MODE": "cloud", "SWANLAB_API_KEY": "key"}, tmp_path, 1)
    assert env["SWANLAB_API_KEY"] == "key"
