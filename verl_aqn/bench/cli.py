"""`verl-aqn bench`: measurements."""

import json
from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(no_args_is_help=True, help="Measure.")


@bench_app.command("mxfp4-quality")
def mxfp4_quality(
    items: Annotated[int, typer.Option(min=2, help="Word problems to answer.")] = 384,
    sequences: Annotated[int, typer.Option(min=2, help="Texts to measure the loss on.")] = 96,
    only: Annotated[list[str] | None, typer.Option(help="Variants, beside bf16 and mse; by default all.")] = None,
    text: Annotated[str, typer.Option(help="Held-out text: a JSONL file or 'embedded'.")] = "embedded",
    calibrate: Annotated[
        list[str] | None, typer.Option(help="Calibration texts; a file may follow 'embedded'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Rounding rules and remedies on SmolLM2-135M: next-token loss and answers, with intervals."""
    from verl_aqn.bench import quality
    from verl_aqn.data.smollm2 import embedded_model
    from verl_aqn.prepare import cache_dir

    model = embedded_model(cache_dir() / "models")
    rows = quality.measure(model, items, sequences, only or list(quality.VARIANTS), text, calibrate or ["embedded"])
    if as_json:
        print(json.dumps(rows))
    else:
        quality.print_table(
            rows, f"{Path(model).name}: loss on {sequences} texts of {Path(text).name}, {items} answers"
        )
