"""`verl-aqn node head|worker`: `ray start` with what this project's runs need of a node of a cluster.

A run's own environment comes with the run (verl_api/nodes.py). Here is what a node must have before: the token, the
devices that it declares, and its own address and network interface, which differ from node to node.
"""

import os
import secrets
import socket
import sys
from pathlib import Path

import psutil

from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.safe_files import is_own_folder

PORT = 6379
CPUS = 32  # logical, as in the cpu profile: the processes take turns
ROOT = Path("/tmp")  # short: the paths of sockets end at 107 characters
STOP_S = 120  # Ray's 3 s for a job that is told to stop are too few to clean its nodes


def ray_start(
    head: str | None, address: str | None, port: int, profile: str, devices: int | None, extra: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of `ray start`, of the head if `head` is None, else of a worker of HEAD_IP:PORT.

    Nothing is open to other machines unless an address is given; a worker takes its own that leads to the head.

    Raises:
        ConfigError: an address that is not this node's. EnvironmentFault: no token, or one that others can read;
            Ray's temporary folder is another user's.
    """
    from verl_aqn.config.compose import detect_profile

    profile = detect_profile() if profile == "auto" else profile
    address = address or ("127.0.0.1" if head is None else _address_towards(head))
    # `ray` of this Python; the dashboard and its job server stay on the head's loopback wherever the nodes meet.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address", address]
    command.append("--disable-usage-stats")
    if head is None:
        command += ["--head", "--port", str(port), "--include-dashboard", "true", "--dashboard-host", "127.0.0.1"]
        command.append("--no-monitor")  # of an autoscaler, which nobody here uses
    else:
        command += ["--address", head]
    command += declared(profile, devices)
    if not any(argument.partition("=")[0] == "--temp-dir" for argument in extra):
        command += ["--temp-dir", str(own_temporary())]
    return [*command, *extra], {**node_environment(address, profile), **token_environment(make=head is None)}


def own_temporary() -> Path:
    """Make Ray's temporary folder on this node: Ray lets all write to what it makes there, so nobody else may enter.

    Raises:
        EnvironmentFault: another user made it first, or others may enter.
    """
    folder = ROOT / f"ray-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_own_folder(folder, 0o700):
        raise EnvironmentFault(f"{folder} is not yours alone: chmod 700 {folder}, or give --temp-dir a folder that is")
    return folder


def declared(profile: str, devices: int | None) -> list[str]:
    """What the node tells Ray that it has. GPUs and NPUs are found by Ray unless a number is given."""
    if profile == "cpu":  # verl places workers by GPU or NPU only: pretended ones
        return ["--num-cpus", str(CPUS), "--num-gpus", str(devices or 1)]
    if devices is None:
        return []
    return ["--num-gpus", str(devices)] if profile == "cuda" else ["--resources", f'{{"NPU": {devices}}}']


def node_environment(address: str, profile: str) -> dict[str, str]:
    """Of Ray's processes on a node, and through them of every worker: what the user has set stays."""
    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PYTHONUTF8"] = "1"
    env.update(RAY_USAGE_STATS_ENABLED="0", RAY_JOB_STOP_WAIT_TIME_S=str(STOP_S))
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"  # jobs call `verl-aqn`
    interface = _interface(address)
    # Without these each library guesses an address, mostly from the host's name: on many machines that is loopback.
    for library in ("GLOO", "TP", {"cuda": "NCCL", "npu": "HCCL", "cpu": "GLOO"}[profile]):
        env.setdefault(f"{library}_SOCKET_IFNAME", interface)
    env.setdefault("VLLM_HOST_IP", address)
    if profile == "cpu":
        env.pop("CUDA_VISIBLE_DEVICES", None)  # Ray refuses a pretended GPU beside an empty list
        env["VERL_PLATFORM"] = "cpu"
    if profile == "npu":
        env.setdefault("HCCL_IF_IP", address)
    return env


def token_file() -> Path:
    """Where Ray looks for the token of the cluster."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def token_environment(*, make: bool) -> dict[str, str]:
    """What makes Ray ask for the token, and show it; the head makes one where there is none.

    Raises:
        EnvironmentFault: there is none, or others can read it.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):  # as Kubernetes gives a secret
        return {"RAY_AUTH_MODE": "token"}
    path = token_file()
    if make and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    if not path.is_file():
        raise EnvironmentFault(
            f"no token in {path}: copy the head's (scp HEAD:{path} {path}), or set RAY_AUTH_TOKEN_PATH"
        )
    if path.stat().st_mode & 0o077:
        raise EnvironmentFault(f"others can read the cluster's token {path}: chmod 600 {path}")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _address_towards(head: str) -> str:
    """This machine's address on the way to HEAD_IP:PORT; nothing is sent."""
    host, sep, port = head.rpartition(":")
    if not sep or not port.isdigit():
        raise ConfigError(f"{head!r} is not of the form HEAD_IP:PORT")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return probe.getsockname()[0]
    except OSError as error:
        raise EnvironmentFault(f"no way to {head} ({error.strerror}): check the address, or give --address") from error


def _interface(address: str) -> str:
    """Name of the network interface that has `address`."""
    found = {one.address: name for name, all_of in psutil.net_if_addrs().items() for one in all_of}
    if address not in found:
        ours = ", ".join(sorted(a for a in found if a.count(".") == 3))
        raise ConfigError(f"--address {address} is not an address of this machine, which has {ours}")
    return found[address]
