"""What each run measured of its own weights, as judged from the records by `verl_aqn.runs.judge`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from verl_aqn.noise.control import AT_MAX, AT_MIN, MOVED
from verl_aqn.runs.evidence import CHAIN
from verl_aqn.runs.judge.base_record import is_old, sentence
from verl_aqn.runs.judge.mismatch import bound, least
from verl_aqn.runs.judge.noise_use import is_visible
from verl_aqn.runs.judge.stock_records import is_visible as shows_use
from verl_aqn.runs.report.charts import Chart, Series, aside, number
from verl_aqn.runs.report.page_data import Run, finite
from verl_aqn.runs.report.sections import span_of
from verl_aqn.runs.report.tables import Cell, Table

Record = dict[str, Any]
NONE = Cell("–")


ROWS = {
    "base": "base on disk, in actor and rollout",
    "adapter": "adapter in the rollout",
    "adapter use": "adapter in the rollout's forward pass",
    "requests": "adapter in the last requests",
    "mismatch": "trainer and rollout without noise",
    "noise": "noise in the rollout's weights",
    "use": "noise in the rollout's forward pass",
    "control": "σ by its controller, decided again from the records",
    "actor noise": "noise in the actor",
    "clean": "clean norms in validation, rescoring and at the end",
    "actor clean": "clean norms in the actor",
    "rollout": "norms in the rollout",
    "placed": "where the run ran",
    "layout": "layout of the actor's batches",
    "strength": "what σ_start does (measured before training)",
    "stopped": "stopped because of its own evidence",
    CHAIN: "records unchanged since they were written",
}
SPANS = 4  # maximum number of ranges of ranks that one cell of a table lists
QUIET = ("placed", "layout", "rollout", "requests", "stopped")
"""Kinds whose row is shown only if there is a fault."""


def checks(runs: Sequence[Run]) -> Table:
    """Return a table with one check per row and one run per column.

    A check has no verdict (neither ✓ nor ✗) without a record, or if its records show nothing (`SHOWS`).
    """
    rows: list[list[Cell]] = []
    for kind, name in ROWS.items():
        cells = [_cell(run, kind) for run in runs]
        if any(cell is not NONE for cell in cells) and (kind not in QUIET or any(cell.good is False for cell in cells)):
            rows.append([Cell(name), *cells])
    return Table("Evidence by run", ["measurement", *(run.label for run in runs)], rows, sortable=False)


def _cell(run: Run, kind: str) -> Cell:
    finding = run.judgement.findings.get(kind)
    if finding is None:
        return NONE
    if finding.faults:
        more = f" (and {len(finding.faults) - 1} more)" if len(finding.faults) > 1 else ""
        return Cell(f"{finding.faults[0]}{more}", good=False)
    records = run.of_kind.get(kind, [])
    counted = f"{finding.right} of {finding.total} records"
    if finding.good is None:
        return Cell(f"{counted} are right; the others are missing or lack a field")
    detail = DETAILS[kind](run, records) if kind in DETAILS and records else counted
    if kind in SHOWS and not any(SHOWS[kind](record) for record in records):
        return Cell(detail)
    return Cell(detail, good=doubt(records) if kind == "mismatch" else True)


def doubt(records: Sequence[Record]) -> bool:
    """Return whether trainer and rollout stayed below the bound for a warning in every compared step."""
    return all(least(record) <= bound(record, "warn") for record in records if record.get("source"))


def _base(run: Run, records: Sequence[Record]) -> str:
    when = " and ".join(str(record.get("when")) for record in records)
    if not is_old(records[0]):
        return f"{sentence(records[0])} ({when})"
    if any(record.get("quantised") is False for record in records):
        return "unquantised base: there was nothing to compare"
    ranks = [one for record in records for one in record.get("rollout") or []]
    slices = any(one.get("slices") for one in ranks)
    sliced = "; the rollout's ranks have slices of the base, which the run itself compared" if slices else ""
    kernels = ", ".join(sorted({str(one.get("kernel")) for one in ranks}))
    return f"packed modules {_short(records[-1].get('disk'))} on disk = actor = rollout ({when}){sliced}; {kernels}"


def _adapter(run: Run, records: Sequence[Record]) -> str:
    text = f"equal in {len(records)} of {len(records)} syncs; last {_short(records[-1].get('sent'))}"
    if not all("requests" in record for record in records):
        return text
    return f"{text}; {sum(record['requests']['with'] for record in records):,} requests used it, none ran without it"


def _adapter_use(run: Run, records: Sequence[Record]) -> str:
    seen = [record for record in records if SHOWS["adapter use"](record)]
    if not seen:
        return f"in none of {len(records)} steps did the adapter change log-probs enough to be detected"
    last = seen[-1]
    return (
        f"changes log-probs by {number(last['effect'])} nats a token in step {last['step']}, where the "
        f"rollout is {number(last['to_adapter'])} from the actor with the adapter and "
        f"{number(last['to_base'])} from the actor without it; detected in {len(seen)} of {len(records)} steps "
        "that were checked"
    )


def _noise(run: Run, records: Sequence[Record]) -> str:
    noisy = [record for record in records if record.get("sigma_target")]
    if not noisy:
        return "no noise in any step, as configured"
    inside = sum(_inside(record) for record in noisy)
    modules = sorted({record.get("modules") or 0 for record in noisy})
    how = "ordered by the controller" if "control" in run.of_kind else "scheduled"
    return (
        f"as {how} in {len(records)} of {len(records)} readings, in {'–'.join(map(str, modules))} modules; "
        f"σ within its 95 % sampling interval in {inside} of {len(noisy)}"
    )


def _use(run: Run, records: Sequence[Record]) -> str:
    seen = [record for record in records if SHOWS["use"](record)]
    if not seen:
        return f"in none of {len(records)} steps was the noise large enough to be detected in log-probs"
    first = seen[0]
    return (
        f"changes log-probs by {number(first['effect'])} nats a token in step {first['step']}, "
        f"{number(first['predicted'])} predicted by {first.get('predicted_by')}; detected in {len(seen)} of "
        f"{sum(bool(record['sigma']) for record in records)} steps with noise, too small in the others"
    )


def _control(run: Run, records: Sequence[Record]) -> str:
    source, measured = records[0]["source"], [one for one in records if one["measured"] is not None]
    moved = sum(record["decision"] == MOVED for record in records)
    bound = sum(record["decision"] in (AT_MIN, AT_MAX) for record in records)
    text = (
        f"{source} measured in {len(measured)} of {len(records)} steps; σ moved in {moved}, was at a bound in {bound}"
    )
    if not measured:
        return text
    last = measured[-1]
    return f"{text}; in step {last['step']} {number(last['measured'])} nats a token, target {number(last['target'])}"


def _clean(run: Run, records: Sequence[Record]) -> str:
    return (
        f"bitwise equal to those at the start in {len(records)} of {len(records)} readings; "
        f"{_short(records[-1].get('weights_digest'))}"
    )


def _mismatch(run: Run, records: Sequence[Record]) -> str:
    compared = [record for record in records if SHOWS["mismatch"](record)]
    if not compared:
        return f"not compared in {len(records)} steps: {records[0].get('reason')}"
    means = [record["abs_dlogp_mean"] for record in compared]
    return (
        f"{number(means[0])} nats a token in step {compared[0]['step']}, at most {number(max(means))} in {len(means)} "
        f"of {len(records)} steps that could be compared"
    )


def _strength(run: Run, records: Sequence[Record]) -> str:
    clean, noisy = records[0]["clean"], records[0]["noisy"]
    text = f"KL {_interval(noisy.get('kl'))} nats a token; entropy {_interval(clean.get('entropy'))} → "
    text += _interval(noisy.get("entropy"))
    if noisy.get("variance"):
        text += f"; groups with variance {_interval([100 * x for x in noisy['variance']])} %"
    return f"σ {number(noisy.get('sigma', 0.0))}: {text}"


DETAILS: dict[str, Callable[[Run, Sequence[Record]], str]] = {
    "base": _base,
    "adapter": _adapter,
    "adapter use": _adapter_use,
    "mismatch": _mismatch,
    "noise": _noise,
    "actor noise": _noise,
    "use": _use,
    "control": _control,
    "clean": _clean,
    "actor clean": _clean,
    "strength": _strength,
}


SHOWS: dict[str, Callable[[Record], Any]] = {
    "mismatch": lambda record: record.get("source"),
    "use": lambda record: record["sigma"] and is_visible(record),
    "adapter use": shows_use,
}
"""Kinds whose records may be right and show nothing: a step that was not compared, an effect too small to be seen."""


def deviation(runs: Sequence[Run]) -> Chart | None:
    """Chart measured σ against target σ, as a difference in percent, with the interval that sampling alone gives."""
    series = []
    for run in runs:
        found: dict[float, tuple[float, tuple[float, float]]] = {}
        for record in run.of_kind.get("noise", []):
            target, measured, interval = (
                record.get(key) for key in ("sigma_target", "sigma_measured", "sigma_interval")
            )
            if not target or finite(measured) is None or not interval or not isinstance(record.get("step"), int):
                continue
            low, high = (100 * (end / target - 1) for end in interval)
            found[record["step"] + 1.0] = 100 * (measured / target - 1), (low, high)
        if found:
            steps = sorted(found)
            points = [(step, found[step][0]) for step in steps]
            bars = [found[step][1] for step in steps]
            name = run.label if len(runs) > 1 else "deviation"
            shift = aside(run.place, len(runs))
            series.append(Series(name, points, run.colour, run.place, bars=bars, shift=shift, joined=False))
    if not series:
        return None
    note = (
        "Measured σ minus target σ, in percent of the target. Bars: where sampling alone puts the value in 95 % of "
        "steps."
    )
    return Chart("deviation", "σ in the rollout", series, span_of(runs), note, " %", ".2f", lines=(0.0,))


def noise_table(run: Run) -> Table:
    """Tabulate every reading of noise in the rollout, grouped by ranks with the same reading.

    For a repeated step the later reading is used.
    """
    newest: dict[int, dict[int, Record]] = {}
    for record in run.of_kind.get("noise", []):
        if isinstance(record.get("step"), int):
            newest.setdefault(record["step"], {}).update(dict.fromkeys(_ranks(record), record))
    readings: dict[tuple[int, int], tuple[int, list[int], Record]] = {}
    for step, by_rank in newest.items():
        for rank, record in sorted(by_rank.items()):
            readings.setdefault((step, id(record)), (step, [], record))[1].append(rank)
    rows = []
    for step, ranks, record in sorted(readings.values(), key=lambda one: one[:2]):
        target, measured, interval = (record.get(key) for key in ("sigma_target", "sigma_measured", "sigma_interval"))
        bounds = " to ".join(number(end) for end in interval) if interval and target else "–"
        rows.append(
            [
                Cell(str(step + 1), step),
                Cell(_spans(ranks), ranks[0]),
                Cell("–" if target is None else number(target), target),
                Cell("–" if measured is None else number(measured), measured),
                Cell(bounds, interval[0] if interval else None, good=_inside(record) if target else None),
                Cell(str(record.get("modules", "–")), record.get("modules")),
                Cell(_short(record.get("weights_digest")), code=True),
            ]
        )
    columns = ["step", "ranks", "target σ", "measured σ", "95 % interval of sampling", "modules", "digest"]
    return Table(f"Noise in the rollout, {run.label}", columns, rows, frozenset(range(6)))


def adapter_table(run: Run) -> Table:
    """Tabulate the adapter's digest after each step: as sent, as found in the rollout, and the number of ranks."""
    newest = {
        record["step"]: record for record in run.of_kind.get("adapter", []) if isinstance(record.get("step"), int)
    }
    rows = []
    for step, record in sorted(newest.items()):
        actual = record.get("actual") or []
        ranks = sum(len(one.get("ranks") or [0]) for one in actual)
        equal = bool(actual) and actual[0].get("adapter_digest") == record.get("sent")
        rows.append(
            [
                Cell(str(step), step),
                Cell(str(record.get("sent", "–")), code=True),
                Cell(_short(actual[0].get("adapter_digest")) if actual else "–", good=equal, code=True),
                Cell(str(ranks), ranks),
            ]
        )
    columns = ["after step", "sent by the actor", "found in the rollout", "ranks"]
    return Table(f"Adapter, {run.label}", columns, rows, frozenset({0, 3}))


def _inside(record: Record) -> bool:
    interval, measured = record.get("sigma_interval"), finite(record.get("sigma_measured"))
    if not interval or measured is None:
        return False
    rounding = record.get("sigma_rounding") or 0.0
    return interval[0] - rounding <= measured <= interval[1] + rounding


def _interval(values: Sequence[float] | None) -> str:
    if not values or len(values) != 3:
        return "–"
    middle, low, high = (f"{value:.3g}" for value in values)
    return f"{middle} [{low}, {high}]"


def _ranks(record: Record) -> list[int]:
    return record.get("ranks") or [record.get("rank", 0)]


def _spans(ranks: Sequence[int]) -> str:
    """Format ascending numbers as '0–7, 16'; if there are many ranges, the first ones and the number of ranks."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    texts = ["–".join(map(str, span)) for span in spans]
    return ", ".join(texts) if len(texts) <= SPANS else f"{', '.join(texts[:SPANS])} … ({len(ranks)} ranks)"


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "–"
