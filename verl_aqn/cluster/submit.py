"""A recipe as a Ray job: submitted on the head, followed, and stopped only on request."""

import asyncio
import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from verl_aqn.cluster.start import token_environment
from verl_aqn.config.compose import find_recipe
from verl_aqn.environment import SECRET
from verl_aqn.errors import EnvironmentFault, Stopped

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# Variables that configure a run and its libraries. `verl-aqn node` sets those that differ between nodes.
_STEERS = re.compile(r"(VERL|VLLM|HF|NCCL|HCCL|WANDB|MLFLOW|SWANLAB|TRACKIO|OMP)_")
_OF_A_NODE = re.compile(r"VLLM_HOST_IP|HCCL_IF_IP|\w+_SOCKET_IFNAME|VLLM_CPU_OMP_THREADS_BIND")


def run_job(address: str, arguments: list[str]) -> int:
    """Submit `verl-aqn train ARGUMENTS` to the cluster with this dashboard. Return exit code 0 if it finished.

    Ctrl-C asks whether to stop the job; otherwise the job goes on without this process.
    """
    find_recipe(arguments[0])
    client = _connect(address)
    sent, kept = variables(os.environ)
    if kept:
        _say(
            f"not sent, because everybody who sees a job can read them: {', '.join(kept)}; set them before ray_start.sh"
        )
    name = f"{Path(arguments[0]).stem}-{secrets.token_hex(3)}"
    job = client.submit_job(
        entrypoint=f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['verl-aqn', 'train', *arguments])}",
        submission_id=name,
        runtime_env={"env_vars": sent},
    )
    ray = f"RAY_AUTH_MODE=token {Path(sys.executable).parent / 'ray'} job"
    _say(f"job {job}; to follow it again: {ray} logs --address {address} --follow {job}")
    shown, stopping = [0], False
    while True:
        try:
            asyncio.run(_follow(client, job, shown))
            break
        except KeyboardInterrupt:
            if not _ask_to_stop(job):
                _say(f"job {job} goes on; to stop it: {ray} stop --address {address} {job}")
                return 0
            stopping = client.stop_job(job)
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    if stopping and status.value == "STOPPED":
        raise Stopped(f"job {job}: stopped by Ctrl-C", signal.SIGINT)
    _say(f"job {job}: {status.value.lower()}")
    return 0 if status.value == "SUCCEEDED" else 1


def variables(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables of `environ` to send with a job, and the names of those left out as secrets."""
    wanted = {name: value for name, value in environ.items() if _STEERS.match(name) and not _OF_A_NODE.fullmatch(name)}
    kept = sorted(name for name in wanted if SECRET.search(name))
    return {name: value for name, value in wanted.items() if name not in kept}, kept


def _connect(address: str) -> "JobSubmissionClient":
    os.environ.update(token_environment(make=False))  # Ray reads these once, when it is imported
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise EnvironmentFault(
            f"no Ray cluster answers at {address}: run this on the head, after scripts/ray_start.sh head"
        ) from error


async def _follow(client: "JobSubmissionClient", job: str, shown: list[int]) -> None:
    """Print the job's output until it ends, from the character `shown`: Ray sends all of it each time."""
    position = 0
    async for text in client.tail_job_logs(job):
        print(text[max(0, shown[0] - position) :], end="", flush=True)
        position += len(text)
        shown[0] = max(shown[0], position)


def _ask_to_stop(job: str) -> bool:
    """Ask whether to stop the job. No answer means no."""
    try:
        return input(f"\nStop job {job}? Otherwise it goes on. [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def _say(text: str) -> None:
    print(f"submit: {text}", file=sys.stderr, flush=True)
