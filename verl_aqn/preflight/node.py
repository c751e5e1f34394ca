"""Examine one machine: the same function runs in a subprocess here and in a Ray task on every node of a cluster."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from verl_aqn.errors import EnvironmentFault
from verl_aqn.runs import host
from verl_aqn.runs.provenance import installed

PACKAGES = ("verl-aqn", "verl", "vllm", "torch", "ray", "transformers", "peft", "compressed-tensors")

# Each probe runs in its own process, because it tests what a *new* process sees.
_PROBES = {
    "verl plugin": "import verl; from verl.plugin.platform.platform_manager import PlatformRegistry as R; "
    "assert R.get('cpu') is not None, 'verl did not load the verl-aqn entry point'; "
    "from verl_aqn.integrations.verl.verl_plugin import check_versions as c; "
    "print(', '.join(f'{k} {v}' for k, v in c().items()))",
    "vLLM plugin": "from vllm.plugins import load_general_plugins as load; load(); "
    "from verl_aqn.integrations.vllm import vllm_plugin as p; "
    "assert p.is_registered(), 'vLLM did not call the verl-aqn plugin'; "
    "print('vllm', p.check_version())",
}
# Print the bytes of every accelerator, one per line.
_DEVICES = {
    "cuda": "import torch; [print(torch.cuda.get_device_properties(i).total_memory) "
    "for i in range(torch.cuda.device_count())]",
    "npu": "import torch, torch_npu; [print(torch.npu.get_device_properties(i).total_memory) "
    "for i in range(torch.npu.device_count())]",
}


@dataclass(frozen=True)
class Node:
    """What one machine has. Sizes are in bytes.

    `devices`: memory of each accelerator; `plugins`: what a new process reports, or why a plugin does not load; `skew`:
    seconds that the clock is ahead of the clock of the machine that asks; `doubt`: the uncertainty of `skew`.
    """

    host: str
    python: str
    versions: dict[str, str]
    memory: int
    shared_memory: int
    disk: int
    devices: list[int]
    plugins: dict[str, str]
    missing: list[str] = field(default_factory=list)
    skew: float = 0.0
    doubt: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine_node(folder: str, profile: str) -> dict[str, Any]:
    """Return this machine as the dictionary of a `Node`.

    `folder`: the folder of the run, which need not exist; `profile`: which devices to look for.
    """
    plugins = {what: _ask(code) for what, code in _PROBES.items()}
    return Node(
        host=socket.gethostname(),
        python=sys.version.split()[0],
        versions=installed(PACKAGES),
        memory=host.memory().available,
        shared_memory=shutil.disk_usage("/dev/shm").free,
        disk=free_disk(Path(folder)),
        devices=devices_here(profile),
        plugins={what: lines[-1] if lines else "no answer" for what, (_, lines) in plugins.items()},
        missing=[what for what, (loaded, _) in plugins.items() if not loaded],
    ).to_dict()


def devices_here(profile: str) -> list[int]:
    """Return the bytes of each accelerator of `profile` on this machine, or none if its library does not answer."""
    answered, lines = _ask(_DEVICES[profile]) if profile in _DEVICES else (False, [])
    return [int(line) for line in lines] if answered else []


def _ask(code: str) -> tuple[bool, list[str]]:
    """Run `code` in a new Python process, and return whether it succeeded and the lines that it printed."""
    # Ray hides every accelerator from a task that requests none, by setting an empty list; a user's own list is kept.
    hidden = [name for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES") if os.environ.get(name) == ""]
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    return probe.returncode == 0, (probe.stdout if probe.returncode == 0 else probe.stderr).strip().splitlines()


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk where `folder` is or would be created."""
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def local_node(folder: str, profile: str) -> Node:
    """Examine this machine in a new process."""
    code = "import json; from verl_aqn.preflight.node import examine_node; "
    code += f"print(json.dumps(examine_node({folder!r}, {profile!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise EnvironmentFault(f"a new Python process cannot examine this machine ({last}): fix the reported problem")
    return Node(**json.loads(done.stdout.splitlines()[-1]))


def cluster_nodes(address: str, folder: str, profile: str) -> tuple[list[Node], dict[str, float]]:
    """Examine every node that is alive in the Ray cluster at `address`, and return the cluster's resources too.

    A node's clock is compared with the middle of a round trip; half of the round trip is the uncertainty.
    """
    from verl_aqn.cluster.start import token_file

    if token_file().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads this once, when it is imported
    import ray

    from verl_aqn.cluster.nodes import alive_nodes, on

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        nodes = []
        for node in alive_nodes():
            facts = ray.get(ray.remote(examine_node).options(**on(node)).remote(folder, profile))
            clock = ray.remote(_now).options(**on(node))
            ray.get(clock.remote())  # start the worker first, so that the next call is answered without delay
            before = time.time()
            then = ray.get(clock.remote())
            after = time.time()
            nodes.append(Node(**facts | {"skew": then - (before + after) / 2, "doubt": (after - before) / 2}))
        return nodes, ray.cluster_resources()
    finally:
        ray.shutdown()


def _now() -> float:
    return time.time()
