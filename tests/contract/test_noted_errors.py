"""Where processes record their errors: in Ray's reply to a failed call, and in log messages before a process ends."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from verl_aqn.launch.cause import Fault, find_cause
from verl_aqn.runs import faults

PROGRAM = """
import os, ray, sys
from verl_aqn.runs.faults import describe

def hook():
    from verl_aqn.integrations.verl.root_cause import note_task_errors
    note_task_errors(); note_task_errors()

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])

class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no pickle")

@ray.remote
class Deep:
    def __init__(self, fails=False):
        hook()
        if fails:
            raise AssertionError("it cannot be created")
    def fail(self):
        raise ValueError("deep down")
    def lose(self):
        raise Unpicklable("deep word")

@ray.remote
class Front:
    def __init__(self, deep):
        hook()
        self.deep = deep
    async def fail(self):
        await self.deep.fail.remote()
    def lose(self):
        ray.get(self.deep.lose.remote())
    def handle(self):
        try:
            ray.get(self.deep.fail.remote())
        except ValueError:
            return 1

deep = Deep.remote()
front = Front.remote(deep)
ray.get(front.handle.remote())
broken = Deep.remote(fails=True)
import json
for call in (front.fail.remote, front.lose.remote, broken.fail.remote):
    try:
        ray.get(call())
    except Exception as error:
        print("SAID " + json.dumps(describe(error)), flush=True)
"""


def test_ray_s_answers_are_noted_where_they_come_from(tmp_path):
    env = {**os.environ, faults.PLACE: str(tmp_path / faults.FILE), "PYTHONPATH": os.pathsep.join(sys.path)}
    (program := tmp_path / "program.py").write_text(PROGRAM)
    with tempfile.TemporaryDirectory(prefix="aqn-", dir="/tmp") as folder:  # short, because of socket paths
        command = [sys.executable, str(program), folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    said = [json.loads(line.removeprefix("SAID ")) for line in done.stdout.splitlines() if line.startswith("SAID ")]
    assert len(said) == 3, done.stderr[-2000:]
    noted = [Fault.of(json.loads(line)) for line in (tmp_path / faults.FILE).read_text().splitlines()]
    found = [find_cause(Fault.of(one), noted) for one in said]
    assert [(one.process, one.type, one.text, one.ends) for one in found] == [
        ("ray::Deep", "ValueError", "deep down", False),
        ("ray::Deep", "Unpicklable", "deep word", False),
        ("ray::Deep", "AssertionError", "it cannot be created", True),
    ]
    assert re.search(r"/program.py:\d+$", found[0].where)
    assert {one.process for one in noted} == {"ray::Deep"}  # a process that passes an error on did not raise it


def test_last_words_of_vllm_and_transfer_queue():
    """These messages mean that a process, or a thread that others wait for, is ending."""
    words = []
    engine = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
    queue = ("transfer_queue.storage.simple_storage", "transfer_queue.storage.managers.simple_storage_manager")
    for module in (*engine, *queue):
        package = importlib.util.find_spec(module.partition(".")[0])
        source = Path(package.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text()
        words += re.findall(r"logger\.(?:exception|error)\(\s*f?\"([^\"]+)\"", source)
    words = [re.sub(r"^\[\{.*?\}\]: ", "[unit]: ", word) for word in words]
    last = [word for word in words if faults.LAST_WORDS.search(word)]
    assert {"EngineCore failed to start.", "EngineCore encountered a fatal error."} < set(last)
    assert {"WorkerProc failed to start.", "WorkerProc failed.", "WorkerProc hit an exception."} < set(last)
    assert {"[unit]: ZMQ Proxy unexpected error: {e}", "[unit]: put_data failed. "} < set(last)
    assert "Invocation of %s method failed" in words  # it is a normal reply, so it is not an error
    assert "Invocation of %s method failed" not in last
