"""The commands `verl-aqn node` and `verl-aqn submit`, which scripts/ray_start.sh and scripts/ray_submit.sh call."""

import os
import subprocess
import sys
from typing import Annotated

import typer

from verl_aqn.cluster.start import PORT, ray_start, token_file

node_app = typer.Typer(no_args_is_help=True, help="Make this machine a node of a Ray cluster.")
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}

Address = Annotated[str | None, typer.Option(help="Address of this machine that the other nodes can reach.")]
Profile = Annotated[str, typer.Option(help="cpu, cuda or npu; by default what this machine has.")]
Devices = Annotated[
    int | None, typer.Option(min=1, help="Number of devices; by default all that are found, 1 on a CPU.")
]


@node_app.command(context_settings=PASSED_ON)
def head(
    context: typer.Context,
    address: Address = None,
    port: Annotated[int, typer.Option(help="Port that workers connect to.")] = PORT,
    profile: Profile = "auto",
    devices: Devices = None,
) -> None:
    """Start a cluster; only this machine can reach it unless --address is given. Other options go to `ray start`."""
    _start(*ray_start(None, address, port, profile, devices, context.args))
    print(f"token: {token_file()}; copy it to each worker (scp), readable by its user only", file=sys.stderr)
    if address:
        print(f"workers: bash scripts/ray_start.sh worker {address}:{port}", file=sys.stderr)
    else:
        print("this node is on loopback, so no worker can join; start it with --address to allow that", file=sys.stderr)


@node_app.command(context_settings=PASSED_ON)
def worker(
    context: typer.Context,
    head: Annotated[str, typer.Argument(metavar="HEAD_IP:PORT")],
    address: Address = None,
    profile: Profile = "auto",
    devices: Devices = None,
) -> None:
    """Join the cluster of a head, with its token. Other options go to `ray start`."""
    _start(*ray_start(head, address, PORT, profile, devices, context.args))


def _start(command: list[str], env: dict[str, str]) -> None:
    """Run `ray start`, which prints its own output, leaves its processes running and returns."""
    if code := subprocess.run(command, env=env, check=False).returncode:
        raise typer.Exit(code)


def submit(
    recipe: Annotated[str, typer.Argument(help="As for `verl-aqn train`; a file must be on the head.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as Hydra takes them.")] = None,
    address: Annotated[str, typer.Option(help="Ray's dashboard on the head.")] = "http://127.0.0.1:8265",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run even if the last one died.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As in `verl-aqn train`, on the head.")] = False,
    restarts: Annotated[int | None, typer.Option(min=0, help="As in `verl-aqn train`.")] = None,
) -> None:
    """Run a recipe or a plan on the Ray cluster of this machine, and follow its output."""
    from verl_aqn.cluster.submit import run_job

    arguments = [recipe, *(overrides or []), *([] if restarts is None else [f"aqn.run.restarts={restarts}"])]
    arguments += [name for name, given in (("--fresh", fresh), ("--dry-run", dry_run)) if given]
    raise typer.Exit(run_job(os.environ.get("RAY_API_SERVER_ADDRESS") or address, arguments))
