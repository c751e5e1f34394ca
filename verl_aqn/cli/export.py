"""The command `verl-aqn export`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from verl_aqn.errors import ConfigError


def export(
    run: Annotated[
        Path, typer.Argument(help="A run, a folder of runs (the newest), or RUN/checkpoints/global_step_N.")
    ],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write a merged model of base and adapter.")] = False,
    format_: Annotated[
        str, typer.Option("--format", help="Of a merged model: bf16, or mxfp4 (rounded to 4 bits again).")
    ] = "bf16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Export a run's adapter for PEFT and vLLM, or a merged model, and check it against the run's record."""
    from verl_aqn.runs.checkpoints import find_checkpoint

    if format_ not in ("bf16", "mxfp4"):
        raise ConfigError(f"--format {format_} is not one of bf16, mxfp4")
    if format_ == "mxfp4" and not merge:
        raise ConfigError("--format mxfp4 is for a merged model (an adapter is in bf16): add --merge")
    if dst.exists() or dst.is_symlink():
        raise ConfigError(f"{dst} already exists and is not overwritten: give another folder")
    find_checkpoint(run)  # checked before the slow imports of torch and transformers
    from verl_aqn.evaluation.export.exporting import export as export_run

    err = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        err.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)

    proof = export_run(run, dst, merge=merge, packed=format_ == "mxfp4", say=say)
    if as_json:
        print(json.dumps(proof))
        return
    for line in lines_of(proof, dst):
        print(line)


def lines_of(proof: dict[str, Any], dst: Path) -> list[str]:
    """Return the lines that describe the proof."""
    from verl_aqn.evaluation.export.export_folders import lines_of_answers, lines_of_rounding  # imports torch
    from verl_aqn.evaluation.export.questions import PROMPTS

    rounding = proof.get("rounding")  # records of earlier versions do not have it
    what = "merged MXFP4 model" if rounding else "merged bf16 model" if proof["merged"] else "PEFT adapter (bf16)"
    lines = [
        f"{what} of {proof['run']}, step {proof['step']}",
        f"adapter {proof['adapter']['digest'][:16]}… is the one that the rollout had; "
        f"it changes {proof['nonzero_b']} of {proof['adapter']['modules']} modules",
    ]
    if merge := proof["merge"]:
        if rounding:
            lines.append(
                f"all {merge['read_back']} tensors were read back; those without an adapter are bit for bit the base's"
            )
        elif "read_back" in merge:
            lines.append(f"all {merge['read_back']} tensors, read back, are bit for bit base + scaling·B·A in bf16")
        lines.append(
            f"{merge['changed']} of {merge['tensors']} adapted weights changed, by {merge['actual_db']:.1f} dB "
            f"(expected: {merge['expected_db']:.1f} dB); verl_aqn_export.json lists the share of each"
        )
        lines += lines_of_rounding(proof)
    elif proof["adapter"].get("read_back"):
        lines.append("the adapter that PEFT reads back from the folder has this digest")
    lines += lines_of_answers(proof["answers"])
    if proof["answers"]["prompts"] < PROMPTS:
        lines.append(f"the validation data have only these {proof['answers']['prompts']} prompts")
    if proof.get("proved"):
        model = "the trainer's model with these rounded weights" if rounding else "the run's model"
        lines.append(f"proved: vLLM with the export behaves like {model}")
    elif undecided := proof["answers"].get("undecided"):
        lines.append(f"this proof cannot distinguish the export from the base: {undecided}")
    return [*lines, f"written: {dst}"]
