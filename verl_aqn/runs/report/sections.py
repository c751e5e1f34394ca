"""The charts and tables about runs: accuracy, training, train–rollout mismatch, rounding error of the base, time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verl_aqn.mxfp4.names import pooled_name
from verl_aqn.noise.spec import layer_and_kind
from verl_aqn.runs.report.charts import COLOURS, Chart, Series, aside
from verl_aqn.runs.report.page_data import Run, finite
from verl_aqn.runs.report.tables import Cell, Table
from verl_aqn.runs.stats.intervals import passed_of, samples_of, wilson

Metrics = dict[str, float]
Value = str | Callable[[Metrics], float | None]  # the name of a metric, or a function of several metrics


@dataclass(frozen=True)
class Panel:
    """A chart over steps. `lines` are (name beside the run's name, value), each with its own dash pattern."""

    key: str
    title: str
    note: str
    lines: tuple[tuple[str, Value], ...]
    unit: str = ""
    form: str = ""
    zero: bool = False
    log: bool = False


def _share(part: str, whole: str) -> Callable[[Metrics], float | None]:
    def of(metrics: Metrics) -> float | None:
        return 100 * metrics[part] / metrics[whole] if part in metrics and metrics.get(whole) else None

    return of


def _percent(key: str) -> Callable[[Metrics], float | None]:
    return lambda metrics: 100 * metrics[key] if key in metrics else None


# These three are read together, so they are stacked over one axis.
TOGETHER = (
    Panel("reward", "Reward", "Mean over a step's responses, under the step's noise.", (("", "critic/score/mean"),)),
    Panel(
        "sigma",
        "σ",
        "Target σ; steps without noise are on the line of 0.",
        (("", "aqn/sigma"),),
        zero=True,
        log=True,
    ),
    Panel(
        "entropy",
        "Entropy",
        "Nats a token. Trainer: over the whole vocabulary. Rollout, with noise: from its sampled tokens.",
        (("trainer", "actor/entropy"), ("rollout", "aqn/mismatch/rollout_entropy_sampled")),
        zero=True,
    ),
)
TRAINING = (
    Panel(
        "length", "Response length", "Tokens, mean over a step's responses.", (("", "response_length/mean"),), zero=True
    ),
    Panel(
        "cut",
        "Truncated responses",
        "Share of responses that reached the maximum length.",
        (("", _percent("response_length/clip_ratio")),),
        unit=" %",
        form=".1f",
        zero=True,
    ),
    Panel(
        "flat",
        "Groups without reward variance",
        "Share of groups whose responses all got the same reward: these groups give no gradient.",
        (("", _share("aqn/groups_without_variance", "aqn/groups")),),
        unit=" %",
        form=".1f",
        zero=True,
    ),
    Panel("gradient", "Gradient norm", "Of the actor, before clipping.", (("", "actor/grad_norm"),), zero=True),
)
# For runs whose σ follows a measurement.
CONTROL = (
    Panel(
        "control",
        "Target of σ",
        "Nats a token: the entropy or the KL that σ follows (aqn.noise.control), and what each step measured.",
        (("measured", "aqn/control/measured"), ("target", "aqn/control/target")),
        log=True,
    ),
)
# For runs whose policy calls tools.
TOOLS = (
    Panel(
        "turns",
        "Messages per conversation",
        "Question, turns of the policy and results of tools, mean over a step's responses; 2 if no tool was called.",
        (("", lambda metrics: metrics.get("training/num_turns/mean") if "aqn/tool_tokens" in metrics else None),),
        zero=True,
    ),
    Panel(
        "tools",
        "Tool tokens",
        "Per response, mean over a step. They are in the policy's context, but not in the loss or in figures "
        "of log-probs.",
        (("", "aqn/tool_tokens"),),
        zero=True,
    ),
)
_PARTS = (("total", ""), ("noise", "noise/"), ("kernels", "kernels/"))
MISMATCH = tuple(
    Panel(
        key,
        title,
        note,
        tuple((name, value(f"aqn/mismatch/{part}{metric}")) for name, part in _PARTS),
        unit,
        ".1f" if unit else "",
        zero=True,
    )
    for key, title, note, metric, unit, value in (
        ("dlogp", "|Δ log p|, mean", "Of the sampled tokens, rollout against trainer.", "abs_dlogp_mean", "", str),
        ("dlogp99", "|Δ log p|, 99th percentile", "Of the same tokens.", "abs_dlogp_p99", "", str),
        ("kl", "KL(rollout ‖ trainer)", "Nats a token, Schulman's k3.", "kl_k3", "", str),
        ("clipped", "Ratio outside PPO's clip range", "Share of tokens.", "clipped_share", " %", _percent),
    )
)
NESTED = {"rescore": "gen"}  # timers that run inside another timer
OUTSIDE = ("testing",)  # timers that are not part of timing_s/step
PHASES = {
    "gen": "generation",
    "rescore": "rescoring without noise",
    "reward": "reward model",
    "old_log_prob": "old log-probs",
    "ref": "reference log-probs",
    "values": "values",
    "adv": "advantages",
    "update_critic": "critic update",
    "update_actor": "actor update",
    "save_checkpoint": "checkpoint",
    "update_weights": "adapter sync to the rollout",
    "other": "rest of the step",
    "testing": "validation",
}


def span_of(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the axis of steps that all charts share: from 0 to the last step of any run."""
    return 0.0, float(max([1, *(step for run in runs for step in (*run.steps, *run.validations))]))


def draw(panels: Sequence[Panel], runs: Sequence[Run]) -> tuple[list[Chart], list[str]]:
    """Return the charts of panels for which some run has values, and the titles of the other panels."""
    charts, missing = [], []
    for panel in panels:
        series = []
        for dash, (name, value) in enumerate(panel.lines):
            for run in runs:
                points = [(float(step), _value(metrics, value)) for step, metrics in run.steps.items()]
                if all(y is None for _, y in points):
                    continue
                label = ", ".join(part for part in (run.label, name) if part) if len(runs) > 1 else name or panel.title
                series.append(Series(label, points, run.colour, run.place, dash))
        if series:
            log = panel.log and any(y for one in series for _, y in one.points)  # a run without noise has only zeros
            chart = Chart(
                panel.key,
                panel.title,
                series,
                span_of(runs),
                panel.note,
                panel.unit,
                panel.form,
                zero=panel.zero,
                log=log,
            )
            charts.append(chart)
        else:
            missing.append(panel.title)
    return charts, missing


def _value(metrics: Metrics, value: Value) -> float | None:
    return finite(metrics.get(value) if isinstance(value, str) else value(metrics))


def accuracy(runs: Sequence[Run]) -> tuple[Chart | None, Table]:
    """Chart and tabulate the accuracy with Wilson's interval at every validation.

    The runs are shifted a little, so that their intervals do not overlap.
    """
    span, rows, series = span_of(runs), [], []
    several = any(samples_of(record) > 1 for run in runs for record in run.validations.values())
    for run in runs:
        points: list[tuple[float, float | None]] = []
        bars = []
        for step, record in run.validations.items():
            items, samples = int(record["items"]), samples_of(record)
            right = round(record["accuracy"] * items * samples)
            share = right / items / samples
            low, high = (100 * end for end in wilson(min(share * items, items), items))
            failed = record.get("failed")  # older records do not have this value
            points.append((float(step), 100 * share))
            bars.append((low, high))
            rows.append(
                [
                    Cell(run.label, colour=run.colour),
                    Cell(str(step), step),
                    Cell(f"{100 * share:.1f} %", share),
                    Cell(f"{low:.1f} to {high:.1f} %", low),
                    Cell(f"{right:,} of {items * samples:,}", right),
                    Cell("not recorded" if failed is None else f"{failed:,}", failed),
                    *([Cell(", ".join(passed_of(record)) or "–")] if several else []),
                ]
            )
        if points:
            name = run.label if len(runs) > 1 else "Accuracy"
            shift = aside(run.place, len(runs))
            series.append(Series(name, points, run.colour, run.place, bars=bars, shift=shift))
    pass_k = ["pass@k, %"] if several else []
    columns = ["run", "after step", "accuracy", "95 % interval", "right", "failed (wrong)", *pass_k]
    table = Table("Accuracy without noise", columns, rows, frozenset({1, 2, 3, 4, 5}))
    if not series:
        return None, table
    note = "Noise off. Bars are 95 % intervals (Wilson) over problems; they do not include the variation between seeds."
    if several:
        note += " If a problem has several responses, their mean is shown, with the widest interval that is possible."
    return Chart("accuracy", "Accuracy", series, span, note, " %", ".1f", tall=True), table


@dataclass(frozen=True)
class Base:
    """The rounding error of one packed base, and the names of the runs that use it."""

    runs: str
    text: str
    chart: Chart | None
    table: Table


def bases(runs: Sequence[Run]) -> tuple[list[Base], list[str]]:
    """Return the SQNR by layer for each base, and a line for each run without this record.

    Runs with the same base share one entry.
    """
    found: dict[str, list[Run]] = {}
    unknown = []
    for run in runs:
        if run.quantization is None:
            unknown.append(f"{run.label}: {run.no_quantization}.")
        else:
            found.setdefault(run.quantization["base_digest"], []).append(run)
    return [_base(place, members) for place, members in enumerate(found.values())], unknown


def _base(place: int, members: list[Run]) -> Base:
    report: dict[str, Any] = members[0].quantization or {}
    pooled: dict[str, list[dict[str, Any]]] = {}
    for module in report["modules"]:  # the experts of a layer are combined
        pooled.setdefault(pooled_name(module["name"]), []).append(module)
    kinds: dict[str, list[tuple[float, float | None]]] = {}
    rows = []
    for name, group in pooled.items():
        sqnr = _sqnr(group)
        layer, kind = layer_and_kind(name)
        if layer is not None:
            kinds.setdefault(kind, []).append((float(layer), sqnr))
        shape = "×".join(map(str, group[0]["shape"])) + (f" ({len(group)})" if len(group) > 1 else "")
        shares = [100 * sum(one[key] for one in group) / len(group) for key in ("deadzone_share", "clipped_share")]
        rows.append(
            [
                Cell(name, code=True),
                Cell("–" if layer is None else str(layer), layer),
                Cell(shape),
                Cell("∞" if sqnr is None else f"{sqnr:.2f}", sqnr),
                *(Cell(f"{share:.2f}", share) for share in shares),
            ]
        )
    chart = None
    if kinds:
        series = [
            Series(kind, sorted(points), at % COLOURS, dash=at // COLOURS % 3)
            for at, (kind, points) in enumerate(kinds.items())
        ]
        span = (0.0, max(x for points in kinds.values() for x, _ in points) or 1.0)
        note = "Packed weights compared with their originals; higher is closer."
        key = f"sqnr{place}"
        chart = Chart(key, "SQNR by layer", series, span, note, " dB", ".2f", "layer", key, tall=True)
    text = (
        f"Scale rule {report['scale_rule']}, {len(report['modules'])} matrices, "
        f"{'∞' if report['sqnr_db'] is None else format(report['sqnr_db'], '.2f')} dB over all; "
        f"{report['bytes_before'] / 1e6:,.1f} → {report['bytes_after'] / 1e6:,.1f} MB. "
        f"Base {report['base_digest'][:12]}."
    )
    columns = ["module", "layer", "shape", "SQNR, dB", "weights in the deadzone, %", "weights clipped, %"]
    table = Table("Rounding error by module", columns, rows, frozenset({1, 3, 4, 5}))
    return Base("; ".join(run.label for run in members), text, chart, table)


def _sqnr(group: list[dict[str, Any]]) -> float | None:
    """Return the SQNR in dB of several matrices together, or None if there is no error at all."""
    noise = sum(one["noise"] for one in group)
    return 10 * math.log10(sum(one["signal"] for one in group) / noise) if noise > 0 else None


@dataclass(frozen=True)
class Times:
    """The time of a run by phase: (name, seconds per step, percent of the total, colour)."""

    run: Run
    total: float
    parts: list[tuple[str, float, float, int]]


def times(runs: Sequence[Run]) -> tuple[list[Times], Table, Chart | None]:
    """Return the mean seconds per step by phase, and the seconds of each step.

    The time of validations is divided over all steps.
    """
    spent = []
    for run in runs:
        sums: dict[str, float] = {}
        for metrics in run.steps.values():
            for name, seconds in _phases(metrics).items():
                sums[name] = sums.get(name, 0.0) + seconds
        saved = {event["step"]: event["seconds"] for event in run.events if event.get("kind") == "checkpoint"}
        if saved and run.steps:  # without its metrics a run has no step to divide by
            sums["save_checkpoint"] = sum(saved.values())
        total = sum(sums.values())
        if total > 0:
            spent.append((run, total, sums))
    names = [name for name in PHASES if any(sums.get(name) for _, _, sums in spent)]
    names += sorted({name for _, _, sums in spent for name in sums if name not in PHASES})
    # The largest phases get colours that are used only once.
    ranked = sorted(names, key=lambda name: -sum(sums.get(name, 0.0) for _, _, sums in spent))
    found = [
        Times(
            run,
            total,
            [
                (
                    PHASES.get(name, name),
                    sums[name] / len(run.steps),
                    100 * sums[name] / total,
                    ranked.index(name) % COLOURS,
                )
                for name in names
                if sums.get(name)
            ],
        )
        for run, total, sums in spent
    ]
    rows = []
    for name in names:
        means = [(sums.get(name, 0.0) / len(run.steps), sums.get(name, 0.0) / total) for run, total, sums in spent]
        cells = [Cell(f"{mean:.2f} s ({100 * share:.0f} %)", mean) for mean, share in means]
        rows.append([Cell(PHASES.get(name, name)), *cells])
    columns = ["phase", *(run.label if len(spent) > 1 else "seconds a step" for run, _, _ in spent)]
    table = Table("Mean seconds a step by phase", columns, rows, frozenset(range(1, len(columns))))
    panel = Panel("seconds", "Seconds a step", "Without validation.", (("", "timing_s/step"),), " s", ".1f", zero=True)
    charts, _ = draw([panel], runs)
    return found, table, charts[0] if charts else None


def _phases(metrics: Metrics) -> dict[str, float]:
    """Return the seconds of a step by phase; each second is counted once."""
    found = {
        key.removeprefix("timing_s/"): finite(value) or 0.0
        for key, value in metrics.items()
        if key.startswith("timing_s/")
    }
    step = found.pop("step", None)
    for name, within in NESTED.items():
        if name in found and within in found:
            found[within] = max(found[within] - found[name], 0.0)
    if step is not None:
        inside = sum(seconds for name, seconds in found.items() if name not in OUTSIDE)
        found["other"] = max(step - inside, 0.0)
    return found
