"""The `verl-aqn` command. Results go to standard output, progress and errors to standard error."""

import contextlib
import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from verl_aqn import __version__
from verl_aqn.cache import cache_dir
from verl_aqn.cli.bench import bench_app
from verl_aqn.cli.cluster import node_app, submit
from verl_aqn.cli.convert import convert
from verl_aqn.cli.export import export
from verl_aqn.cli.quantize import quantize
from verl_aqn.cli.selftest import selftest
from verl_aqn.environment import settle
from verl_aqn.errors import AqnError, ConfigError, EnvironmentFault, Stopped, system_line
from verl_aqn.safe_files import keep_to_oneself
from verl_aqn.terminal import print_wide, progress_bar

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
data_app = typer.Typer(no_args_is_help=True, help="Prepare data sets.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(node_app, name="node")
app.command()(submit)
app.command()(quantize)
app.command()(export)
app.command()(convert)
app.command()(selftest)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Recipe = Annotated[str, typer.Argument(help="A file, or the bare name of one in recipes/.")]
CTRL_C, OUTPUT = "stopped by Ctrl-C", "standard output"
NO_SUCH_HOME = "Could not determine home directory."
RecipeOrPlan = Annotated[str, typer.Argument(help="A file, or the bare name of one in recipes/ or recipes/plans/.")]


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def callback(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Train MXFP4 language models by RL with LoRA and adaptive quantization noise, on stock verl."""


@app.command()
def train(
    recipe: RecipeOrPlan,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as Hydra takes them.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve and check the recipe, print it, and stop.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run even if the last one died.")] = False,
    restarts: Annotated[
        int | None,
        typer.Option(min=0, help="Maximum number of automatic restarts after a crash or a hang."),
    ] = None,
) -> None:
    """Run a recipe or a plan of several recipes. Resume a run that did not finish."""
    from verl_aqn.config.compose import find_recipe
    from verl_aqn.launch.plan import read_plan
    from verl_aqn.launch.sweep import Series
    from verl_aqn.launch.train import train as run

    path = find_recipe(recipe)
    overrides = [*(overrides or []), *([] if restarts is None else [f"aqn.run.restarts={restarts}"])]
    if plan := read_plan(path, overrides):
        if fresh:
            raise ConfigError(
                "--fresh works for a single run only. For a plan, choose a new folder with aqn.run.dir=DIR"
            )
        series = Series(plan, path)
        raise typer.Exit(series.preview() if dry_run else series.run())
    extra = ["aqn.run.fresh=true"] if fresh else []
    raise typer.Exit(run(recipe, [*overrides, *extra], dry_run=dry_run))


@app.command()
def schedule(
    recipe: Recipe,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as Hydra takes them.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="RL steps, if the recipe does not set them.")] = None,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG, SVG or PDF).")] = None,
) -> None:
    """Show σ at every step."""
    from verl_aqn.config.compose import load_recipe
    from verl_aqn.config.noise_settings import schedule_of
    from verl_aqn.config.schema import parse_aqn

    if plot:
        from verl_aqn.cli.plots import check_picture

        check_picture(plot)
    config = load_recipe(recipe, overrides)
    total = steps or config.trainer.total_training_steps
    if total is None:
        from verl_aqn.preflight.run_data import steps_in_data

        total = steps_in_data(config)
    if total is None:
        raise ConfigError(
            f"{recipe} gets its steps from data.train_files={config.data.train_files}, which does not exist: "
            "prepare this file, or give --steps N"
        )
    table = schedule_of(config, int(total)).table()
    if plot:
        from verl_aqn.cli.plots import plot_schedule

        plot_schedule(table, recipe, plot)
    if as_json:
        print(json.dumps(table))
        return
    before = ", before target_kl scales it" if config.aqn.noise.target_kl is not None else ""
    if rule := parse_aqn(config).noise.controller:
        before = f", before {rule.target} moves it"
    view = Table(title=escape(f"σ of {recipe} over {total} steps{before}"), title_justify="left")
    for column in ("step", "stage", "σ"):
        view.add_column(column, justify="right")
    for row in table:
        view.add_row(str(row["step"]), str(row["stage"]), f"{row['sigma']:.3g}")
    print_wide(view)


@app.command()
def probe(
    recipe: Recipe,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as Hydra takes them.")] = None,
    sigma: Annotated[
        list[float] | None,
        typer.Option(help="σ to measure besides σ_start. Repeatable; default: σ_start/27 … ·3."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Number of prompts from the training data.")] = 16,
    samples: Annotated[int, typer.Option(min=2, help="Number of responses sampled for each prompt.")] = 4,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture (PNG, SVG or PDF).")] = None,
) -> None:
    """Measure how σ changes the policy before training: KL, entropy, accuracy, groups with reward variance."""
    if any(not 0 < value < math.inf for value in sigma or ()):
        raise ConfigError("--sigma must be above 0. The policy without noise is always measured")
    if plot:
        from verl_aqn.cli.plots import check_picture

        check_picture(plot)
    from verl_aqn.config.compose import load_recipe

    config = load_recipe(recipe, overrides)
    from verl_aqn.launch.train import resolve
    from verl_aqn.preflight.probe import FACTORS, Probe, check_strength, survey

    prepared = resolve(config)
    with progress_bar("tokens of responses:") as progress:
        measured = Probe(prepared.config, prepared.steps, prompts, samples, progress=progress)
        start, unit = measured.order.sigma, measured.order.unit
        sigmas = [*(sigma or [float(f"{start * factor:.3g}") for factor in FACTORS]), start]
        rows = survey(measured, sigmas)
    title = f"σ of {recipe} ({unit}), {prepared.source.name}: {prompts} prompts × {samples} responses"
    if plot:
        from verl_aqn.cli.plots import plot_strength

        plot_strength(rows, start, title, f"σ ({unit})", plot)
    if as_json:
        print(json.dumps({"sigma_start": start, "unit": unit, "step": measured.order.step, "prompts": prompts,
                          "samples": samples, "rows": [row.to_dict() for row in rows]}))  # fmt: skip
    else:
        view = Table(title=escape(title), title_justify="left")
        for column in ("σ", "KL, nats per token", "entropy", "accuracy, %", "groups with variance, %"):
            view.add_column(column, justify="right")
        for row in rows:
            shares = [_interval([100 * x for x in share], ".0f") for share in (row.accuracy, row.variance) if share]
            mark = " ← σ_start" if row.sigma == start else ""
            view.add_row(f"{row.sigma:.3g}{mark}", _interval(row.kl, ".3g"), _interval(row.entropy, ".3g"), *shares)
        print_wide(view)
    sys.stdout.flush()
    check_strength(measured, rows, start)


@app.command("eval")
def eval_(
    target: Annotated[
        Path, typer.Argument(help="A run, a checkpoint (global_step_N), or a model folder, packed or not.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as Hydra takes them.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter folder to use instead of the run's.")] = None,
    precision: Annotated[str | None, typer.Option(help="mxfp4 or bf16; by default that of the run or folder.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Responses to each problem, sampled as in training: avg@N and pass@1 … pass@N."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy without noise, with the rollout and the code that validate during training. Save every item."""
    from verl_aqn.evaluation.evaluate import evaluate

    result = evaluate(target, overrides or [], adapter, precision, samples)
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    title = f"{target.name}, step {result.step}, {result.precision}, noise off"
    view = Table(title=escape(title), title_justify="left")
    for column in ("score", "accuracy, %", "95 % interval", "problems"):
        view.add_column(column, justify="left" if column == "score" else "right")
    average = f", avg@{result.samples}" if result.samples > 1 else ""
    rows = {f"{name}{average}": score for name, score in result.scores.items()}
    rows |= {f"strict, pass@{k}": score for k, score in result.pass_at.items()}
    for name, score in rows.items():
        low, high = (100 * bound for bound in score.interval)
        view.add_row(name, f"{100 * score.accuracy:.1f}", f"{low:.1f} to {high:.1f}", str(result.items))
    print_wide(view)
    if result.failed:
        print(f"{result.failed} of {result.items * result.samples} responses failed and count as wrong")
    if result.adapter_is:
        print(f"adapter: {result.adapter_is}")
    print(f"items: {result.file}")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs, or of experiments (their newest run), control first.")
    ],
    factor: Annotated[
        list[str] | None, typer.Option(help="A key that may differ, with all keys under it. Repeatable.")
    ] = None,
    any_: Annotated[bool, typer.Option("--any", help="Allow any difference between the runs.")] = False,
    as_json: Json = False,
    metric: Annotated[
        str, typer.Option(help="Score of a problem: avg (the fraction of its responses that are right) or pass@K.")
    ] = "avg",
) -> None:
    """Run paired tests on runs with the same validation items. Runs of one config are the seeds of one arm."""
    from verl_aqn.launch.console import Console
    from verl_aqn.runs.stats.arms import FACTOR, arms
    from verl_aqn.runs.stats.compare import compare as compared

    report = compared(arms(runs, factor or [FACTOR], any_, metric))
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        Console().report(report)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of experiments (their newest run).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write. It must not exist yet.")],
    factor: Annotated[list[str] | None, typer.Option(help="As in `compare`. Repeatable.")] = None,
    any_: Annotated[bool, typer.Option("--any", help="As in `compare`.")] = False,
    answers: Annotated[int, typer.Option(min=0, help="Validation problems to show with their responses.")] = 24,
) -> None:
    """Write one self-contained HTML page about runs: charts, evidence, responses side by side, comparison."""
    from verl_aqn.runs.report.page import write_report
    from verl_aqn.runs.stats.arms import FACTOR

    size = write_report(runs, output, factor or [FACTOR], any_, answers)
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {size / 1e6:.1f} MB")


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A file, or the bare name of one in recipes/.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as Hydra takes them.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only print how many devices of which size the recipe's model needs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that this machine can run a recipe: versions, plugin, nodes; with RECIPE also memory, disk, ports, data."""
    from verl_aqn.preflight.doctor import examine
    from verl_aqn.preflight.doctor_tables import findings_table, memory_table, plan_table

    report = examine(recipe, overrides, plan=plan)
    if as_json:
        print(json.dumps(report.to_dict()))
        raise typer.Exit(1 if report.faults else 0)
    if report.findings:
        print_wide(findings_table(report.findings, recipe))
    if report.memory:
        print_wide(memory_table(report.memory))
    if report.plan:
        print_wide(plan_table(report.plan, recipe or ""))
    raise typer.Exit(1 if report.faults else 0)


@app.command()
def runs(
    folder: Annotated[
        Path | None, typer.Argument(help="A folder that contains runs (aqn.run.dir); by default /tmp/mxfp4_*.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recorded runs: how they ended and what accuracy they reached."""
    from verl_aqn.runs.run_list import find_runs, listed, table

    found = [listed(run) for run in find_runs(folder)]
    if as_json:
        print(json.dumps(found))
        return
    if not found:
        print("No runs in /tmp/mxfp4_*: start one with `verl-aqn train RECIPE`, or name a folder")
        return
    print_wide(table(found))
    for row in found:
        if row["status"] == "damaged":
            print(f"warning: {row['message']}", file=sys.stderr)


@data_app.command("gsm8k")
def data_gsm8k(
    dst: Annotated[Path | None, typer.Option(help="Folder to write to; by default the cache.")] = None,
    source: Annotated[
        Path | None, typer.Option(help="Folder with train.jsonl and test.jsonl; by default the Hugging Face hub.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write GSM8K (7,473 training and 1,319 test problems) in the form that verl reads."""
    from verl_aqn.cache import cache_dir
    from verl_aqn.tasks.data_files import count_rows
    from verl_aqn.tasks.gsm8k_data import prepare_gsm8k

    files = prepare_gsm8k(dst or cache_dir() / "data" / "gsm8k", source)
    rows = {split: {"file": str(path), "rows": count_rows(path)} for split, path in files.items()}
    if as_json:
        print(json.dumps(rows))
    else:
        for split, row in rows.items():
            print(f"{split}: {row['rows']:,} problems in {row['file']}")


def main() -> None:
    """Run the command line; print an error that the user can fix as one line.

    The exit code is 2 for wrong use, 128 + the signal's number after a signal, and 1 for other errors. System errors
    (OSError) are reported here, so that no command has to. An unexpected exception keeps its traceback, because it is a
    bug in this package.
    """
    keep_to_oneself()
    settle()
    try:
        if any("\udc80" <= letter <= "\udcff" for argument in sys.argv for letter in argument):
            raise ConfigError("an argument is not UTF-8: rename the file or folder in question")
        try:
            os.getcwd()
        except FileNotFoundError:
            raise EnvironmentFault("the working directory does not exist any more: change to another one") from None
        code = app(standalone_mode=False)  # the code of a typer.Exit is returned, not raised
        if code == 130:  # Typer's code for Ctrl-C
            raise KeyboardInterrupt
        _flush()
        sys.exit(code)
    except ConfigError as error:
        _fail(str(error), 2)
    except AqnError as error:
        _fail(str(error), 1)
    except Stopped as error:
        _fail(str(error), 128 + error.signal)
    except (KeyboardInterrupt, typer.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # Typer's abort for a prompt without answer; nothing prompts here
            raise stop.__cause__ from None
        _fail(CTRL_C, 130)
    except OSError as error:
        _fail(_of_system(error), 1)
    except Exception as error:
        if str(error) == NO_SUCH_HOME:  # pathlib's message
            _fail("a path begins with ~ and a name that is no user of this machine: write the full path", 2)
        # Typer's own errors (a missing argument, an unknown option) format themselves as one line.
        if not hasattr(error, "format_message"):
            raise
        if "\n" in error.format_message():  # no command was given, so this is the help text
            print(error.format_message())
            sys.exit(2)
        _fail(_usage(error), 2)


def _flush() -> None:
    """Write the rest of the output while an error can still be reported."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = OUTPUT
        raise


def _of_system(error: OSError) -> str:
    """Return the message for a system error. If nobody reads the output any more, exit without a message."""
    if isinstance(error, BrokenPipeError) and error.filename == OUTPUT:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards what is still in the buffer
        sys.exit(1)
    with contextlib.suppress(EnvironmentFault):
        return system_line(error, str(cache_dir()))
    return system_line(error)


def _usage(error: Any) -> str:
    """Return Typer's message for wrong use. For an unknown option, return our own message with the nearest option."""
    if not hasattr(error, "possibilities"):
        return error.format_message()
    near = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
    return f"no option {error.option_name}" + (f": did you mean {near[0]}?" if near else "")


def _interval(values: Sequence[float], form: str) -> str:
    middle, low, high = (format(value, form) for value in values)
    return f"{middle} [{low}, {high}]"


def _fail(text: str, code: int) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)
