"""The command `verl-aqn quantize`. It is not in verl_aqn.mxfp4, so that other commands need not import torch."""

import json
import math
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.markup import escape
from rich.table import Table

from verl_aqn.cli.plots import check_picture
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.terminal import print_wide, progress_bar

if TYPE_CHECKING:
    from verl_aqn.checkpoints.error_report import QuantReport


def quantize(
    src: Annotated[Path, typer.Argument(help="A bf16 checkpoint folder, or an MXFP4 one to convert.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    scale_rule: Annotated[str, typer.Option(help="mse, even, floor or rceil.")] = "mse",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="A module to leave in bf16: its name, the end of it, or a pattern with *. May be repeated."),
    ] = None,
    format_: Annotated[
        str,
        typer.Option("--format", help="compressed-tensors (vLLM), modelslim (vllm-ascend, W4A4) or modelslim-w4a8."),
    ] = "compressed-tensors",
    calibrate: Annotated[
        list[str] | None,
        typer.Option(help="Reduce rounding errors with GPTQ on these texts: a JSONL file or 'embedded'. Repeatable."),
    ] = None,
    keep_worst: Annotated[
        float,
        typer.Option(help="Leave the layers that rounding hurts most in bf16: up to this share of the weights."),
    ] = 0.0,
    keep_by: Annotated[
        str,
        typer.Option(help="What they are chosen by: sqnr, or loss (on the texts of --calibrate, or 'embedded')."),
    ] = "sqnr",
    plot: Annotated[Path | None, typer.Option(help="Write a plot by layer (PNG, SVG or PDF).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Quantise a bf16 checkpoint to a packed MXFP4 checkpoint that stock vLLM loads."""
    if not (src / "config.json").is_file():  # checked before the slow import of torch
        raise ModelError(f"{src} is not a Hugging Face model folder: it has no config.json")
    if plot:
        check_picture(plot)
    if not 0 <= keep_worst < 1:
        raise ConfigError(f"--keep-worst {keep_worst:g}: give a share of the weights from 0 to below 1")
    from verl_aqn.config.schema import KeepBy  # here, so that --help need not wait for omegaconf

    if keep_by not in get_args(KeepBy):
        raise ConfigError(f"--keep-by {keep_by} is not one of {', '.join(get_args(KeepBy))}")
    from verl_aqn.checkpoints.foreign import foreign_layout, import_checkpoint
    from verl_aqn.checkpoints.packing import EXCLUDE, check_choices, quantize_checkpoint
    from verl_aqn.checkpoints.storage import read_config
    from verl_aqn.checkpoints.writing import check_free

    check_choices(scale_rule, format_)  # before a calibration, which takes minutes
    check_free(dst)
    if kind := foreign_layout(read_config(src), src):
        if exclude or plot or calibrate or keep_worst or scale_rule != "mse":
            raise ConfigError(
                f"{src} is already MXFP4 ({kind}) and is not rounded again: remove --exclude, --plot, --calibrate, "
                "--keep-worst and --scale-rule"
            )
        with progress_bar("converting") as progress:
            imported = import_checkpoint(src, dst, format_, progress)
        if as_json:
            print(json.dumps(asdict(imported)))
        else:
            size = _megabytes(imported.bytes_before, imported.bytes_after)
            print(f"{src.name} is already MXFP4 ({kind}): {imported.modules} modules converted bit for bit, {size}")
        return

    def pack(folder: Path, leave: tuple[str, ...], format: str) -> "QuantReport":
        with progress_bar("quantising") as progress:
            if calibrate:
                from verl_aqn.checkpoints.gptq import quantize_with_gptq

                return quantize_with_gptq(src, folder, calibrate, scale_rule, leave, progress, format)
            return quantize_checkpoint(src, folder, scale_rule, leave, progress, format=format)

    leave = (*EXCLUDE, *(exclude or ()))
    if keep_worst:
        from verl_aqn.checkpoints.keeping import worst

        with tempfile.TemporaryDirectory(prefix="verl-aqn-keep-") as folder:
            pack(Path(folder) / "packed", leave, "compressed-tensors")
            with progress_bar("measuring layers") as progress:
                kept = worst(src, Path(folder) / "packed", keep_worst, keep_by, leave, calibrate or (), progress)
        leave = (*leave, *kept)
    report = pack(dst, leave, format_)
    title = f"{src.name} in MXFP4 ({scale_rule}): {_db(report.sqnr_db)} dB overall"
    if plot:
        from verl_aqn.cli.plots import plot_quantization

        plot_quantization(list(report.modules), title, plot)
    if as_json:
        print(json.dumps(report.to_dict()))
        return
    print_wide(table(report, title))
    print(left_line(report))


def _db(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def table(report: "QuantReport", title: str) -> Table:
    """Return a table with one row per module; the experts of a layer share one row."""
    from verl_aqn.checkpoints.error_report import PARTS, pool_experts

    size = _megabytes(report.bytes_before, report.bytes_after)
    view = Table(title=escape(f"{title}, checkpoint {size}"), title_justify="left")
    view.add_column("module")
    shares = ["% of weights\ndeadzone", "\nclipped"]
    parts = ["% of error\ndeadzone", *(f"\n{part.replace('_', ' ')}" for part in PARTS[1:])]
    for column in ("shape", "SQNR\ndB", *shares, *parts, "bytes\nbefore", "\nafter"):
        view.add_column(column, justify="right")
    for row in pool_experts(report.modules):
        error = row.error
        view.add_row(
            row.name,
            "×".join(map(str, row.shape)),
            _db(row.sqnr_db),
            *(f"{100 * share:.2f}" for share in (error.deadzone_share, error.clipped_share)),
            *(f"{100 * getattr(error, part) / error.noise:.1f}" if error.noise else "–" for part in PARTS),
            f"{row.bytes_before:,}",
            f"{row.bytes_after:,}",
        )
    return view


def left_line(report: "QuantReport") -> str:
    """Return a line that lists the modules that are not packed; equal modules of all layers are listed once."""
    pooled: dict[str, int] = {}
    for name in report.left:
        key = re.sub(r"\.\d+(?=\.)", ".*", name)
        pooled[key] = pooled.get(key, 0) + 1
    names = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in pooled.items())
    return f"kept in 16 bits: {names or 'no linear layer'}; embeddings, norms and biases are never packed"


def _megabytes(before: int, after: int) -> str:
    return f"{before / 1e6:,.1f} → {after / 1e6:,.1f} MB"
