"""`verl-aqn export`."""

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
    merge: Annotated[bool, typer.Option("--merge", help="A bf16 model of base and adapter instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """A run's adapter as PEFT and vLLM load it, or a merged bf16 model; proved against the run's own record."""
    from verl_aqn.runs.checkpoints import find_checkpoint

    if dst.exists() or dst.is_symlink():
        raise ConfigError(f"{dst} exists already: nothing is overwritten, give another folder")
    find_checkpoint(run)  # a run that is none is told before torch and transformers are imported
    from verl_aqn.export.exporting import export as export_run

    err = Console(stderr=True, highlight=False)
    proof = export_run(run, dst, merge=merge, say=lambda text: err.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True))
    if as_json:
        print(json.dumps(proof))
        return
    for line in lines_of(proof, dst):
        print(line)


def lines_of(proof: dict[str, Any], dst: Path) -> list[str]:
    """The proof in words."""
    from verl_aqn.export.questions import PROMPTS  # imports torch

    lines = [
        f"{'merged bf16 model' if proof['merged'] else 'PEFT adapter (bf16)'} of {proof['run']}, step {proof['step']}",
        f"adapter {proof['adapter']['digest'][:16]}… is the one that the rollout had; "
        f"{proof['nonzero_b']} of {proof['adapter']['modules']} modules differ from the base",
    ]
    if merge := proof["merge"]:
        lines += [
            f"{merge['changed']} of {merge['tensors']} tensors changed, by {merge['got_db']:.1f} dB of the weights "
            f"(asked: {merge['asked_db']:.1f} dB)",
            f"bf16 held {100 * merge['kept']:.0f} % of what the adapter adds: "
            "an update below 2^-9 of a weight is rounded away",
        ]
    answers = proof["answers"]
    near = ""
    if farthest := max(answers["differing"], key=lambda entry: entry["gap"], default=None):
        near = f", the others part within {farthest['gap']:.3g} nats of a tie ({farthest['bound']:g} allowed)"
    lines.append(f"{answers['equal']} of {answers['prompts']} greedy answers are those of {answers['against']}{near}")
    if answers["prompts"] < PROMPTS:
        lines.append(f"the validation data have no more than these {answers['prompts']} prompts")
    return [*lines, f"written: {dst}"]
