"""`verl-aqn node head|worker`: `ray start` with everything that a node needs for runs of this project.

A run brings its own environment (process_environment.py). This module sets what a node needs before: the token, the
devices that it declares, and its own address and network interface, which differ between nodes.
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
CPUS = 32  # logical CPUs, as in the cpu profile: the processes take turns
ROOT = Path("/tmp")  # short, because paths of sockets have at most 107 characters
STOP_S = 120  # Ray's default of 3 s for stopping a job is too short to clean its nodes


def ray_start(
    head: str | None, address: str | None, port: int, profile: str, devices: int | None, extra: list[str]
) -> tuple[list[str], dict[str, str]]:
    """Return arguments and environment of `ray start`: of the head if `head` is None, else of a worker.

    `head`: HEAD_IP:PORT of the cluster to join. Nothing is open to other machines unless an address is given; a worker
    uses its own address on the route to the head.

    Raises:
        ConfigError: an address that is not this node's.
        EnvironmentFault: no token, a token that others can read, or another user's temporary folder for Ray.
    """
    from verl_aqn.config.compose import detect_profile

    profile = detect_profile() if profile == "auto" else profile
    address = address or ("127.0.0.1" if head is None else _address_towards(head))
    # The `ray` of this Python. The dashboard with its job server always stays on the head's loopback.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address", address]
    command.append("--disable-usage-stats")
    if head is None:
        command += ["--head", "--port", str(port), "--include-dashboard", "true", "--dashboard-host", "127.0.0.1"]
        command.append("--no-monitor")  # the monitor belongs to the autoscaler, which is not used here
    else:
        command += ["--address", head]
    command += declared(profile, devices)
    if not any(argument.partition("=")[0] == "--temp-dir" for argument in extra):
        command += ["--temp-dir", str(own_temporary())]
    return [*command, *extra], {**node_environment(address, profile), **token_environment(make=head is None)}


def own_temporary() -> Path:
    """Create Ray's temporary folder on this node and return it.

    Ray creates files there that everybody may write to, so no other user may enter the folder.

    Raises:
        EnvironmentFault: another user created it first, or others may enter.
    """
    folder = ROOT / f"ray-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_own_folder(folder, 0o700):
        raise EnvironmentFault(
            f"other users can access {folder}: chmod 700 {folder}, or set --temp-dir to a folder of your own"
        )
    return folder


def declared(profile: str, devices: int | None) -> list[str]:
    """Return the devices that the node declares to Ray. Ray finds GPUs and NPUs unless a number is given."""
    if profile == "cpu":  # verl places workers by GPU or NPU only, so the node declares simulated GPUs
        return ["--num-cpus", str(CPUS), "--num-gpus", str(devices or 1)]
    if devices is None:
        return []
    return ["--num-gpus", str(devices)] if profile == "cuda" else ["--resources", f'{{"NPU": {devices}}}']


def node_environment(address: str, profile: str) -> dict[str, str]:
    """Return the environment of Ray's processes on a node and of all workers. The user's own settings are kept."""
    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PYTHONUTF8"] = "1"
    env.update(RAY_USAGE_STATS_ENABLED="0", RAY_JOB_STOP_WAIT_TIME_S=str(STOP_S))
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"  # so that jobs find `verl-aqn`
    interface = _interface(address)
    # Otherwise each library guesses an address, mostly from the host name: on many machines that is loopback.
    for library in ("GLOO", "TP", {"cuda": "NCCL", "npu": "HCCL", "cpu": "GLOO"}[profile]):
        env.setdefault(f"{library}_SOCKET_IFNAME", interface)
    env.setdefault("VLLM_HOST_IP", address)
    if profile == "cpu":
        env.pop("CUDA_VISIBLE_DEVICES", None)  # Ray refuses a simulated GPU together with an empty list
        env["VERL_PLATFORM"] = "cpu"
    if profile == "npu":
        env.setdefault("HCCL_IF_IP", address)
    return env


def token_file() -> Path:
    """Return the path where Ray looks for the cluster's token."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def token_environment(*, make: bool) -> dict[str, str]:
    """Return the variables that make Ray use token authentication; `make`: create a missing token, as on the head.

    Raises:
        EnvironmentFault: there is no token, or others can read it.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):  # Kubernetes passes a secret this way
        return {"RAY_AUTH_MODE": "token"}
    path = token_file()
    if make and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    if not path.is_file():
        raise EnvironmentFault(
            f"no token in {path}: copy it from the head (scp HEAD:{path} {path}), or set RAY_AUTH_TOKEN_PATH"
        )
    if path.stat().st_mode & 0o077:
        raise EnvironmentFault(f"other users can read the cluster's token {path}: chmod 600 {path}")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _address_towards(head: str) -> str:
    """Return this machine's address on the route to HEAD_IP:PORT. Nothing is sent."""
    host, sep, port = head.rpartition(":")
    if not sep or not port.isdigit():
        raise ConfigError(f"{head!r} does not have the form HEAD_IP:PORT")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return probe.getsockname()[0]
    except OSError as error:
        raise EnvironmentFault(
            f"no route to {head} ({error.strerror}): check the address, or give --address"
        ) from error


def _interface(address: str) -> str:
    """Return the name of the network interface with this address."""
    found = {one.address: name for name, all_of in psutil.net_if_addrs().items() for one in all_of}
    if address not in found:
        ours = ", ".join(sorted(a for a in found if a.count(".") == 3))
        raise ConfigError(f"--address {address} is not an address of this machine: use one of {ours}")
    return found[address]
