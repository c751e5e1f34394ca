"""Terminal output of a run: one line per step while the run goes on, and a short table at its end."""

import math
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.table import Table

from verl_aqn.config.schema import TargetConfig, parse_aqn
from verl_aqn.launch.supervise import Outcome
from verl_aqn.preflight.run_data import data_files, has_own_class
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.run_list import sigmas
from verl_aqn.runs.stats.compare import Report
from verl_aqn.runs.stats.compare import table as comparison_table
from verl_aqn.runs.stats.intervals import pass_text, samples_of, share_text, validation_text
from verl_aqn.runs.stats.verdict import compare_validations, target_verdict
from verl_aqn.terminal import print_wide

if TYPE_CHECKING:
    from verl_aqn.launch.train import Prepared
    from verl_aqn.preflight.strength_figures import Strength


# Name of a rule in the table → its key in the record of a validation.
RULES = {"strict": "accuracy", "flexible": "flexible", "math-verify": "math_verify"}


MOST_SIGMAS = 3  # of one stage, in the table at the end; from more, the largest and the smallest are shown


class Console:
    """Print progress on standard error and the result on standard output."""

    def __init__(self) -> None:
        self.out = RichConsole(highlight=False)
        self.err = RichConsole(stderr=True, highlight=False)
        self.began = time.monotonic()
        self.width = 1
        self.validation: dict | None = None

    def say(self, text: str) -> None:
        """Print one line of progress with the time since the start. Markup in `text` is printed as it is."""
        self._line(escape(text))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._line(f"[yellow]warning:[/yellow] {escape(text)}")

    def _line(self, markup: str) -> None:
        passed = int(time.monotonic() - self.began)
        self.err.print(f"[dim]{passed // 60:3d}:{passed % 60:02d}[/dim]  {markup}", soft_wrap=True)

    def start(self, run: RunFolder, prepared: "Prepared") -> None:
        """Print what is about to run and where its records are kept."""
        aqn = parse_aqn(prepared.config)
        self.width = len(str(prepared.steps))
        self.say(f"run      {run.path}")
        if run.note:
            self.say(f"resumed  {run.note}; --fresh starts a new run" if run.resumed else run.note)
        rounded = (run.block("quantization.json") or {}).get("scale_rule") or "rounded by another tool"
        base = f"MXFP4 ({rounded})" if aqn.mxfp4.enabled else "unquantised"
        form = aqn.mxfp4.rollout_weight_format
        served = f" (in {form} in the rollout)" if aqn.mxfp4.enabled and form in ("bf16", "int8") else ""
        model = prepared.config.actor_rollout_ref.model
        first = f" from {model.lora_adapter_path}" if model.lora_adapter_path else ""
        self.say(f"model    {prepared.source.name}, {base} base{served}, LoRA r={model.lora_rank}{first}")
        self.say(f"data     {prepared.rows['train']:,} training and {prepared.rows['test']:,} validation prompts")
        noise = aqn.noise
        if noise.enabled:
            unit = {"rms": "of each module's rms", "multiplicative": "of each weight"}.get(noise.unit, noise.unit)
            how = f"{noise.num_stages} stages"
            if rule := noise.controller:
                how = f"{rule.ends(prepared.steps)}, σ {rule.sigma_min:g} to {rule.sigma_max:g}"
            self.say(f"noise    σ {sigmas(asdict(noise))} ({unit}), {how}, {prepared.steps} steps")
            if prepared.fitted:
                self.say(f"         σ_start found for a KL of {noise.target_kl:g}: {_nats(prepared.fitted.kl)}")
        else:
            self.say(f"noise    none, {prepared.steps} steps")

    def strength(self, clean: "Strength", noisy: "Strength") -> None:
        """Print the effect of σ_start on the policy."""
        text = (
            f"strength σ {noisy.sigma:g}: KL {_nats(noisy.kl)}, entropy {clean.entropy[0]:.3g} → {noisy.entropy[0]:.3g}"
        )
        if clean.variance and noisy.variance:
            text += (
                f", groups with variance {100 * clean.variance[0]:.0f} % → {100 * noisy.variance[0]:.0f} % "
                f"[{100 * noisy.variance[1]:.0f}, {100 * noisy.variance[2]:.0f}]"
            )
        else:
            text += " of the first turn (without tool outputs, so that rewards are not measured)"
        self.say(text)

    def record(self, name: str, record: dict) -> None:
        """Print a new record of the run, if its kind is one that users see."""
        kind = record.get("kind")
        if kind == "phase":
            self.say(record["text"])
        elif kind == "warning":
            self.warn(record["text"])
        elif kind == "step":
            metrics = record["metrics"]
            self.say(
                f"step {record['step']:{self.width}d}/{record['total']}   "
                f"σ {metrics.get('aqn/sigma', 0.0):<8.2e} "
                f"reward {_number(metrics, 'critic/score/mean'):6.3f}   "
                f"entropy {_number(metrics, 'actor/entropy'):5.2f}   "
                f"{_number(metrics, 'timing_s/step'):5.1f} s"
            )
            self.say_accuracy()
        elif kind == "validation":
            self.validation = record
            if record["step"] == 0:  # later ones are printed after the line of their step, which is written after them
                self.say_accuracy()

    def report(self, report: Report) -> None:
        """Print a comparison: its table, one sentence for each pair of arms, and one if code is not known."""
        print_wide(comparison_table(report))
        for contrast in report.arms:
            self.out.print(contrast.text, soft_wrap=True, markup=False)
        if report.caution:
            self.out.print(report.caution, soft_wrap=True, markup=False)
        sys.stdout.flush()

    def say_accuracy(self) -> None:
        """Print the newest validation, unless it was printed before."""
        if self.validation:
            problems = self.validation["items"]
            self.say(f"accuracy {validation_text(self.validation)}")
            others = [
                f"{rule} {share_text(self.validation[key], problems)}"
                for rule, key in RULES.items()
                if rule != "strict" and key in self.validation
            ]
            if others:
                self.say(f"         {', '.join(others)}")
            self.validation = None

    def end(self, run: RunFolder, prepared: "Prepared", outcome: Outcome) -> int:
        """Print tables and verdict of a finished run, or one line about an unfinished one. Return the exit code."""
        if outcome.status != "finished":
            log = run.path / "training.log"
            self.err.print(f"[red]error:[/red] {escape(outcome.message)} (log: {escape(str(log))})", soft_wrap=True)
            return 1
        self.out.print(sigma_table(run))
        self.out.print(result_table(run))
        if by_source := source_table(run):
            self.out.print(by_source)
        self.out.print(verdict(run, prepared), soft_wrap=True)
        if failed := failed_text(run):
            self.out.print(failed, soft_wrap=True, markup=False)
        self.out.print(f"[dim]record: {escape(str(run.path))}[/dim]", soft_wrap=True)
        sys.stdout.flush()
        return 0


def _number(metrics: dict, name: str) -> float:
    """Return a metric of a step, or NaN if it was not measured or is null on record."""
    value = metrics.get(name)
    return math.nan if value is None else value


def _nats(values: tuple[float, float, float]) -> str:
    middle, low, high = values
    return f"{middle:.3g} nats per token (95 % interval {low:.2g}–{high:.2g})"


def sigma_table(run: RunFolder) -> Table:
    """Return a table of σ by stage: the target, and the value measured in the rollout's norms."""
    table = Table(title="Noise by stage", title_justify="left")
    for column in ("stage", "steps", "σ target", "σ in the rollout", "norms"):
        table.add_column(column, justify="right")
    stages: dict[int, list[dict]] = {}
    for record in run.by_step("evidence.jsonl", "noise").values():
        stages.setdefault(record["stage"], []).append(record)
    for stage, group in stages.items():
        steps = [record["step"] for record in group]
        target = sorted({record["sigma_target"] for record in group}, reverse=True)
        parted = ", "
        if len(target) > MOST_SIGMAS:  # σ follows a measurement (aqn.noise.control)
            target, parted = [target[0], target[-1]], " to "
        measured = [record["sigma_measured"] for record in group]
        span = f"{min(steps)}" if len(steps) == 1 else f"{min(steps)}–{max(steps)}"
        table.add_row(
            str(stage),
            span,
            parted.join("0" if sigma == 0 else f"{sigma:.2e}" for sigma in target),
            "0" if max(measured) == 0 else f"{sum(measured) / len(measured):.3e}",
            str(group[0]["modules"]),
        )
    return table


def result_table(run: RunFolder) -> Table:
    """Return accuracy at each validation, by rule, with its interval. A rule without a value on record shows “–”."""
    table = Table(title="Accuracy (noise off), % with 95 % interval", title_justify="left")
    validations = list(run.by_step("metrics.jsonl", "validation").values())
    several = any(map(pass_text, validations))
    for column in ("step", *RULES, "problems", *(("answers each", "of them, %") if several else ())):
        table.add_column(column, justify="right")
    for validation in validations:
        count = validation["items"]
        shares = [escape(share_text(validation.get(key), count)) for key in RULES.values()]
        passed = [str(samples_of(validation)), pass_text(validation) or "–"] if several else []
        table.add_row(str(validation["step"]), *shares, str(count), *passed)
    return table


def failed_text(run: RunFolder) -> str:
    """Return how many responses of the run failed; "" if none did.

    Only a run that allows failures (`aqn.run.allow_failed`) finishes with some.
    """
    steps = run.by_step("metrics.jsonl", "step").values()
    trained = sum(int(_number(step["metrics"], "aqn/answers_failed") or 0) for step in steps
                  if "aqn/answers_failed" in step["metrics"])  # fmt: skip
    validated = sum(record.get("failed") or 0 for record in run.by_step("metrics.jsonl", "validation").values())
    if not trained and not validated:
        return ""
    return (
        f"failed: {trained:,} training responses, which were not trained on, and {validated:,} validation responses, "
        "which count as wrong (failures.jsonl has the reasons)"
    )


def source_table(run: RunFolder) -> Table | None:
    """Return the accuracy of the last validation by data source; None if there is only one source."""
    *_, last = run.by_step("metrics.jsonl", "validation").values()
    if not last.get("by_source"):
        return None
    table = Table(title=f"Accuracy by data source after step {last['step']}, %", title_justify="left")
    table.add_column("data source")
    for column in (*RULES, "problems"):
        table.add_column(column, justify="right")
    for source, found in last["by_source"].items():
        shares = [f"{100 * found[key]:.2f}" if key in found else "–" for key in RULES.values()]
        table.add_row(escape(source), *shares, str(found["items"]))
    return table


def is_targets_task(target: TargetConfig, prepared: "Prepared", problems: int) -> bool:
    """Return whether a run is of the model and on the `problems` that its recipe's target is for."""
    from verl_aqn.tasks.data_files import sources_of

    if target.model and target.model not in str(prepared.source):
        return False
    if target.problems and problems != target.problems:
        return False
    if not target.source:
        return True
    # A data set class of the user's own may show other rows than its files hold.
    return not has_own_class(prepared.config) and {
        source for file in data_files(prepared.config, "val_files") for source in sources_of(file)
    } == {target.source}


def verdict(run: RunFolder, prepared: "Prepared") -> str:
    """Say whether the recipe's target is met, and whether training changed the accuracy (paired test)."""
    validations = list(run.by_step("metrics.jsonl", "validation").values())
    first, last = validations[0], validations[-1]
    target = parse_aqn(prepared.config).target
    comparable = target.accuracy is not None and is_targets_task(target, prepared, last["items"])
    text = target_verdict(last, target, comparable)
    if first["step"] == last["step"]:
        return text
    change = compare_validations(run, first["step"], last["step"])
    return f"{text}\n{change.text}" if change else text
