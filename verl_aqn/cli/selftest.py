"""The command `verl-aqn selftest`."""

from pathlib import Path
from typing import Annotated

import typer


def selftest(
    device: Annotated[str, typer.Option(help="cpu, cuda or npu; by default what this machine has.")] = "auto",
    minutes: Annotated[float, typer.Option(help="Time for all rungs together.")] = 10,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A new folder for page, JSON file and logs.")
    ] = None,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Only what needs no package but torch: codec and packed layer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Check this machine's device, from the codec to a training run, and write one page to attach to an issue."""
    from verl_aqn.selftest.command import selftest as climb

    raise typer.Exit(climb(device, minutes, output, kernels_only, as_json))
