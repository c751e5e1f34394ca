"""The commands `verl-aqn bench NAME`."""

import atexit
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.terminal import print_wide, stdout_as_stderr

bench_app = typer.Typer(no_args_is_help=True, help="Measurements for the documentation, each beside its peers.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def _check_shape(shape: str) -> None:
    from verl_aqn.bench.shapes import SHAPES

    if shape not in SHAPES:
        raise ConfigError(f"--shape {shape} is not known: use one of {', '.join(SHAPES)}")


@bench_app.command("mxfp4")
def mxfp4(
    device: Annotated[str, typer.Option(help="cpu, cuda or npu; by default what this machine has.")] = "auto",
    size: Annotated[int, typer.Option(help="The matrix is SIZE × SIZE.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements per row.")] = 7,
    as_json: Json = False,
) -> None:
    """Measure the codec beside a memory copy, torchao and compressed-tensors, and the linear layer beside bf16."""
    import torch

    from verl_aqn.bench.codec_speed import measure

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator.type if accelerator else "cpu"
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=rounds)
        result = measure(device, size, rounds, lambda done, total: progress.update(task, completed=done))
    if as_json:
        print(json.dumps(result))
        return
    threads = f", {result['threads']} threads" if device == "cpu" else ""
    codec = Table(title=f"MXFP4 codec, {size} × {size}, {result['device']}{threads}", title_justify="left")
    for column in ("rule: even by default", "dtype", "ms", "GB/s", "of copy", "ours faster"):
        codec.add_column(column, justify="left" if column in ("rule: even by default", "dtype") else "right")
    for row in result["codec"]:
        faster = row.get("ours_times_as_fast")
        codec.add_row(
            row["name"],
            row["dtype"],
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['gbytes_per_s']:.1f}",
            f"{row['of_copy']:.2f}",
            f"{faster:,.0f} ×" if faster else "",
        )
    print_wide(codec)
    linear = Table(title="Linear layer, forward and backward; time and bytes relative to bf16", title_justify="left")
    for column in ("weights", "tokens×K×N", "ms", "time", "bytes"):
        linear.add_column(column, justify="left" if column in ("weights", "tokens×K×N") else "right")
    for row in result["linear"]:
        linear.add_row(
            row["name"],
            "×".join(map(str, row["shape"])),
            f"{row['seconds'] * 1e3:.1f}",
            f"{row['time_of_bf16']:.2f}",
            f"{row['bytes_of_bf16']:.3f}",
        )
    print_wide(linear)


@bench_app.command("mxfp4-quality")
def mxfp4_quality(
    model: Annotated[str, typer.Option(help="A bf16 model folder, or 'embedded'.")] = "embedded",
    items: Annotated[int, typer.Option(min=0, help="Number of word problems; 0 for the loss alone.")] = 384,
    sequences: Annotated[int, typer.Option(min=2, help="Number of texts for the loss.")] = 96,
    only: Annotated[list[str] | None, typer.Option(help="Variants besides bf16 and mse; by default all.")] = None,
    text: Annotated[str, typer.Option(help="Held-out text: a JSONL file or 'embedded'.")] = "embedded",
    calibrate: Annotated[
        list[str] | None, typer.Option(help="Calibration texts: a JSONL file or 'embedded'. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Scale rules, GPTQ and kept layers on a model: next-token loss and answers, with intervals."""
    from verl_aqn.bench import quality
    from verl_aqn.cache import cache_dir
    from verl_aqn.tasks.smollm2 import embedded_model

    if items == 1:
        raise ConfigError("--items 1 has no interval: give at least 2, or 0 for the loss alone")
    folder = embedded_model(cache_dir() / "models") if model == "embedded" else Path(model)
    rows = quality.measure(folder, items, sequences, only or list(quality.VARIANTS), text, calibrate or ["embedded"])
    if as_json:
        print(json.dumps(rows))
    else:
        title = f"{folder.name}: loss on {sequences} texts of {Path(text).name}, {items} responses"
        quality.print_table(rows, title)


@bench_app.command("step")
def step(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value for all arms, as Hydra takes them.")] = None,
    model: Annotated[str, typer.Option(help="A model folder, or 'embedded'.")] = "embedded",
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each run, after a warm-up step.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each arm; the arms take turns.")] = 2,
    workload: Annotated[
        str, typer.Option(help="Tokens of a response: 24 (6 prompts × 8 responses), 192 (4 × 4) or 512 (2 × 8).")
    ] = "24",
    small: Annotated[bool, typer.Option("--small", help="2 prompts × 4 samples, for test models.")] = False,
    tuned: Annotated[
        bool,
        typer.Option("--tuned", help="Compare with tuned stock verl only. Stock defaults take two thirds of the time."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the whole RL step on CPUs beside stock verl with a bf16 base (with its defaults, and tuned)."""
    from verl_aqn.bench.step import ARMS, WORKLOADS, check, measure, overrides, table

    if workload not in WORKLOADS:
        raise ConfigError(f"--workload {workload} is not one of {', '.join(WORKLOADS)}")
    settings = [*overrides(model, steps, small, workload), *(settings or [])]
    names = ARMS[:2] if tuned else ARMS
    check(settings)
    base = Path(tempfile.mkdtemp(prefix="verl-aqn-bench-"))  # kept if a run fails, because it has the log
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("steps", total=len(names) * rounds * (steps + 1))
        result = measure(settings, steps, rounds, base, lambda done: progress.update(task, completed=done), names)
    if as_json:
        print(json.dumps(result))
    else:
        print_wide(table(result))
        print(f"Bytes sent to the rollout per step: {result['synced_of_bf16_weights']:.1%} of the bf16 weights.")
    if result["failed"]:
        raise EnvironmentFault("; ".join(result["failed"].values()))
    shutil.rmtree(base)


@bench_app.command("growth")
def growth(
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of every run, after one that warms up.")] = 2,
    small: Annotated[bool, typer.Option("--small", help="3 runs in place of 10, without an exponent of size.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG, SVG or PDF).")] = None,
    as_json: Json = False,
) -> None:
    """Time and memory of the RL step against model size, samples and length of answers, with fitted exponents."""
    from verl_aqn.cli.plots import check_picture, plot_growth

    if plot:
        check_picture(plot)
    from verl_aqn.bench.growth import measure, table

    base = Path(tempfile.mkdtemp(prefix="verl-aqn-bench-"))  # kept if a run fails, because it has the log
    with Console(stderr=True).status("starting") as status:
        result = measure(steps, small, base, status.update)
    shutil.rmtree(base)
    if plot:
        plot_growth(result, plot)
    if as_json:
        print(json.dumps(result))
    else:
        print_wide(table(result))


@bench_app.command("records")
def records(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the actor and of the rollout.")] = 1024,
    answers: Annotated[
        int, typer.Option(min=16, help="Responses per step and per validation, 8 per prompt.")
    ] = 131_072,
    ways: Annotated[int, typer.Option(min=1, help="Ranks of one replica, each with a different part of the base.")] = 8,
    matrices: Annotated[int, typer.Option(min=2, help="Packed matrices of the base.")] = 1024,
    layers: Annotated[int, typer.Option(min=1, help="Layers with two norms each.")] = 64,
    as_json: Json = False,
) -> None:
    """Simulate what a run of many ranks and responses records and looks up: bytes and processor seconds."""
    if ranks % ways or 64 % ways:
        raise ConfigError(f"--ways {ways}: give a divisor of 64 and of --ranks")
    from verl_aqn.bench import many_ranks as simulated

    with tempfile.TemporaryDirectory(prefix="verl-aqn-bench-") as folder:
        rows = simulated.simulate(Path(folder), simulated.Sizes(ranks, answers, ways, matrices, layers))
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print_wide(simulated.table(rows))


@bench_app.command("update")
def update(
    shape: Annotated[str, typer.Option(help="A model's size: 135M, 1.5B, 7B, …")] = "135M",
    layers: Annotated[int | None, typer.Option(min=1, help="Use only this many layers.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or npu.")] = "cpu",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Responses per prompt.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 100,
    response: Annotated[int, typer.Option(min=1, help="Tokens per response.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Measured updates of each arm.")] = 7,
    as_json: Json = False,
) -> None:
    """Measure the actor's update: packed base, bf16 base, and packed base with shared prompts, all with bf16 LoRA."""
    _check_shape(shape)
    from verl_aqn.bench.update_speed import measure, table

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=rounds)
        sizes = (prompts, samples, prompt, response)
        result = measure(shape, layers, device, sizes, rounds, lambda done: progress.update(task, completed=done))
    if as_json:
        print(json.dumps(result))
    else:
        print_wide(table(result))


@bench_app.command("decode")
def decode(
    shape: Annotated[str, typer.Option(help="A model's size: 135M, 1.5B, 7B, …")] = "135M",
    sequences: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences at once; by default 1, 16 and 48.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Decode steps of each round.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each arm.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure a decode step of vLLM on this CPU, packed and bf16, beside the time of its matrix products alone."""
    _check_shape(shape)
    from verl_aqn.bench.decode_speed import measure, table

    with stdout_as_stderr(), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=1)
        result = measure(
            shape,
            sequences or [1, 16, 48],
            tokens,
            rounds,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        print(json.dumps(result))
    else:
        print_wide(table(result))
    # Triton's library, which vLLM imports, lists its own objects when the process ends.
    atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)


@bench_app.command("families")
def families(
    names: Annotated[list[str] | None, typer.Argument(help="Families; by default all.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Keep models, runs and results here, and continue from them.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Parallel runs.")] = 1,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Run two steps of GRPO on a tiny model of each family, and report what works, also without noise or packing."""

    from verl_aqn.bench import family_runs
    from verl_aqn.bench.families import FAMILIES

    wanted = names or list(FAMILIES)
    base = out or Path(tempfile.mkdtemp(prefix="verl-aqn-bench-"))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("families", total=len(wanted))

        def told(result: family_runs.Result) -> None:
            progress.console.print(" · ".join(family_runs.cells(result)), highlight=False, markup=False)
            progress.advance(task)

        results = family_runs.run_families(wanted, base, jobs, told)
    if out is None:
        shutil.rmtree(base)
    if as_json:
        print(json.dumps([asdict(result) for result in results]))
    elif as_markdown:
        print(family_runs.markdown(results))
    else:
        print_wide(family_runs.table(results))


@bench_app.command("attention")
def attention(
    device: Annotated[str, typer.Option(help="cpu, cuda or npu.")] = "cpu",
    heads: Annotated[int, typer.Option(min=1, help="Attention heads of size 64.")] = 9,
    kv_heads: Annotated[int, typer.Option(min=1, help="Heads of keys and values.")] = 3,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each arm; the fastest counts.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure one layer's attention over groups of responses: dense mask, separate rows, and shared prompts."""
    if heads % kv_heads:
        raise ConfigError(f"--heads {heads} is not a multiple of --kv-heads {kv_heads}")
    from verl_aqn.bench.attention_speed import measure, table

    result = measure(device, heads, kv_heads, prompt, rounds)
    if as_json:
        print(json.dumps(result))
    else:
        print_wide(table(result))


@bench_app.command("guard")
def guard(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each ratio; the median counts.")] = 5,
    record: Annotated[bool, typer.Option("--record", help="Save these ratios as the baseline.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the ratio of our time to a peer's with recorded ratios. Exit with code 1 if one is worse."""
    from verl_aqn.bench import guard as bench

    then = {} if record else bench.recorded()
    with Console(stderr=True).status("measuring for half a minute"):
        now = bench.confirmed(rounds, then)
    if record:
        bench.record(now)
    worse = bench.worse(now, then)
    if as_json:
        print(json.dumps({"now": now, "recorded": then, "worse": worse}))
    else:
        print_wide(bench.table(now, then))
    if worse:
        raise typer.Exit(1)


@bench_app.command("verdicts")
def verdicts(
    trials: Annotated[int, typer.Option(min=1, help="Simulated comparisons per case.")] = 400,
    accuracy: Annotated[
        float, typer.Option(min=0.05, max=0.94, help="Accuracy of the control, a fraction of 1.")
    ] = 0.75,
    as_json: Json = False,
) -> None:
    """Measure how often `compare` is wrong, on simulated runs whose true difference is known."""
    from verl_aqn.bench.verdicts import summary, survey

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating")
        rows = survey(trials, accuracy, lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        print(json.dumps(rows))
        return
    title = f"Verdicts of `compare`, % of {trials} simulated comparisons, minimum and maximum over seed spreads of "
    view = Table(title=f"{title}0 to 3 points; control at {100 * accuracy:g} %", title_justify="left")
    for column in (
        "seeds",
        "problems",
        *(f"{what} at {d} points" for what in ("false", "a verdict") for d in (0, 2, 5)),
    ):
        view.add_column(column, justify="right")
    for row in summary(rows):
        cells = [f"{100 * low:.1f}–{100 * high:.1f}" for low, high in row["false"].values()]
        cells += [f"{100 * low:.0f}–{100 * high:.0f}" for low, high in row["reached"].values()]
        view.add_row(str(row["seeds"]), str(row["items"]), *cells)
    print_wide(view)


@bench_app.command("memory")
def memory(
    recipe: Annotated[str, typer.Argument(help="Recipe whose sizes are used.")] = "e12_aggressive_1ep",
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the recipe: KEY=VALUE.")] = None,
    as_json: Json = False,
) -> None:
    """Estimate, from config.json alone, how many devices of which kind public models need for a recipe."""
    from verl_aqn.bench.what_fits import estimate, parts_table, table

    rows = estimate(recipe, overrides=overrides or ())
    if as_json:
        print(json.dumps(rows))
        return
    print(table(rows))
    for device in ("H100", "A2, one die of A3"):
        print(f"\n{device}\n\n{parts_table(rows, device)}")
