"""What each run read back of itself, checked here once more from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from verl_aqn.report.charts import Chart, Series, aside, number
from verl_aqn.report.records import Run, finite
from verl_aqn.report.sections import span_of
from verl_aqn.report.tables import Cell, Table

Record = dict[str, Any]
NONE = Cell("–")


def checks(runs: Sequence[Run]) -> Table:
    """A check a row, a run a column. A check that cannot be made from the records has no verdict."""
    rows: list[list[Cell]] = []
    for name, check in CHECKS:
        cells = [check(run) for run in runs]
        if any(cell is not NONE for cell in cells):
            rows.append([Cell(name), *cells])
    return Table("Evidence by run", ["what was read back", *(run.label for run in runs)], rows, sortable=False)


def _base(run: Run) -> Cell:
    records = run.of_kind.get("base", [])
    if not records:
        return NONE
    if any(record.get("quantised") is False for record in records):
        return Cell("unquantised base: nothing to compare")
    good, digests = True, set()
    for record in records:
        held = record.get("rollout") or []
        whole = [one.get("base_digest") for one in held if not one.get("slices")]
        packed = {record.get("disk"), *(record.get("actor") or [])}
        served = {record.get("served", record.get("disk")), *whole}
        good &= len(packed) == len(served) == 1 and all(one.get("weights_equal_base") is not False for one in held)
        digests.add(record.get("disk"))
    when = " and ".join(str(record.get("when")) for record in records)
    sliced = any(one.get("slices") for record in records for one in record.get("rollout") or [])
    kernels = sorted({str(one.get("kernel")) for record in records for one in record.get("rollout") or []})
    text = (
        f"{_short(records[-1].get('disk'))} on disk{' = actor = rollout' if good else ', but not everywhere'} ({when})"
    )
    text += "; ranks of the rollout hold slices, which the run itself compared" if sliced else ""
    return Cell(f"{text}; {', '.join(kernels)}", good=good and len(digests) == 1)


def _adapter(run: Run) -> Cell:
    records = run.of_kind.get("adapter", [])
    if not records:
        return NONE
    # Only the first rank surely holds what `sent` is the digest of: others may hold other slices.
    unlike = [record for record in records if not (held := record.get("held")) or
              held[0].get("adapter_digest") != record.get("sent")]  # fmt: skip
    text = f"equal in {len(records) - len(unlike)} of {len(records)} syncs; last {_short(records[-1].get('sent'))}"
    return Cell(text, good=not unlike)


def _noise(kind: str) -> Callable[[Run], Cell]:
    def check(run: Run) -> Cell:
        records = [record for record in run.of_kind.get(kind, []) if record.get("sigma_asked")]
        if not records:
            return Cell("no noise in any step") if run.of_kind.get(kind) else NONE
        inside = [record for record in records if _inside(record)]
        strays = sum(record.get("changed_outside") or 0 for record in records)
        modules = sorted({record.get("modules") or 0 for record in records})
        text = (
            f"{'–'.join(map(str, modules))} modules; σ within its 95 % sampling interval in {len(inside)} of "
            f"{len(records)} readings; {strays} weights changed that were to be clean"
        )
        return Cell(text, good=strays == 0 and modules[0] > 0)

    return check


def _clean(kind: str) -> Callable[[Run], Cell]:
    def check(run: Run) -> Cell:
        records = run.of_kind.get(kind, [])
        if not records:
            return NONE
        first = next(
            (one.get("clean_digest") for one in run.of_kind.get("rollout", [])), records[0].get("clean_digest")
        )
        equal = [one for one in records if one.get("weights_digest") == one.get("clean_digest") == first]
        text = f"bit for bit those of the start in {len(equal)} of {len(records)} readings; {_short(first)}"
        return Cell(text, good=len(equal) == len(records))

    return check


def _mismatch(run: Run) -> Cell:
    records = [one for one in run.of_kind.get("mismatch", []) if isinstance(one.get("step"), int)]
    if not records:
        return NONE
    means = [finite(one.get("abs_dlogp_mean")) for one in records]
    known = [mean for mean in means if mean is not None]
    good = len(known) == len(means) and all(
        mean <= (finite(one.get("warn")) or 0.0) for mean, one in zip(known, records, strict=True)
    )
    if not known:
        return Cell(f"no figure in {len(records)} steps", good=False)
    text = f"{number(known[0])} nats a token in step {records[0]['step']}, at most {number(max(known))} "
    return Cell(text + f"in {len(known)} of {len(records)} compared steps", good=good)


def _strength(run: Run) -> Cell:
    record = next(iter(run.of_kind.get("strength", [])), None)
    if not record or not (noisy := record.get("noisy")) or not (clean := record.get("clean")):
        return NONE
    text = f"KL {_interval(noisy.get('kl'))} nats a token; entropy {_interval(clean.get('entropy'))} → "
    text += _interval(noisy.get("entropy"))
    if noisy.get("variance"):
        text += f"; groups with variance {_interval([100 * x for x in noisy['variance']])} %"
    return Cell(f"σ {number(noisy.get('sigma', 0.0))}: {text}")


CHECKS: tuple[tuple[str, Callable[[Run], Cell]], ...] = (
    ("packed base", _base),
    ("adapter in the rollout", _adapter),
    ("trainer against the rollout without noise", _mismatch),
    ("noise in the rollout", _noise("noise")),
    ("noise in the actor", _noise("actor noise")),
    ("clean norms in validation, rescoring and at the end", _clean("clean")),
    ("clean norms in the actor", _clean("actor clean")),
    ("what σ_start does (measured before training)", _strength),
)


def deviation(runs: Sequence[Run]) -> Chart | None:
    """σ as read back against σ as asked, in percent of it, with the interval that sampling alone gives."""
    series = []
    for run in runs:
        found: dict[float, tuple[float, tuple[float, float]]] = {}
        for record in run.of_kind.get("noise", []):
            asked, realised, interval = (record.get(key) for key in ("sigma_asked", "sigma_realised", "sigma_interval"))
            if not asked or finite(realised) is None or not interval or not isinstance(record.get("step"), int):
                continue
            low, high = (100 * (end / asked - 1) for end in interval)
            found[record["step"] + 1.0] = 100 * (realised / asked - 1), (low, high)
        if found:
            steps = sorted(found)
            points = [(step, found[step][0]) for step in steps]
            bars = [found[step][1] for step in steps]
            name = run.label if len(runs) > 1 else "deviation"
            shift = aside(run.place, len(runs))
            series.append(Series(name, points, run.colour, run.place, bars=bars, shift=shift, joined=False))
    if not series:
        return None
    note = "Realised σ less the asked one, in percent of it. Bars: where sampling alone puts it in 95 % of steps."
    return Chart("deviation", "σ in the rollout", series, span_of(runs), note, " %", ".2f", lines=(0.0,))


def noise_table(run: Run) -> Table:
    """Every reading of noise in the rollout: the later one of a step that was taken twice, by rank."""
    newest = {
        (record["step"], record.get("rank", 0)): record
        for record in run.of_kind.get("noise", [])
        if isinstance(record.get("step"), int)
    }
    rows = []
    for (step, rank), record in sorted(newest.items()):
        asked, realised, interval = (record.get(key) for key in ("sigma_asked", "sigma_realised", "sigma_interval"))
        held = " to ".join(number(end) for end in interval) if interval and asked else "–"
        rows.append(
            [
                Cell(str(step + 1), step),
                Cell(str(rank), rank),
                Cell("–" if asked is None else number(asked), asked),
                Cell("–" if realised is None else number(realised), realised),
                Cell(held, interval[0] if interval else None, good=_inside(record) if asked else None),
                Cell(str(record.get("modules", "–")), record.get("modules")),
                Cell(_short(record.get("weights_digest")), code=True),
            ]
        )
    columns = ["step", "rank", "σ asked", "σ realised", "95 % interval of sampling", "modules", "digest"]
    return Table(f"Noise in the rollout, {run.label}", columns, rows, frozenset(range(6)))


def adapter_table(run: Run) -> Table:
    """The adapter's digest after each step: as sent, and how many ranks answered."""
    newest = {
        record["step"]: record for record in run.of_kind.get("adapter", []) if isinstance(record.get("step"), int)
    }
    rows = []
    for step, record in sorted(newest.items()):
        held = record.get("held") or []
        equal = bool(held) and held[0].get("adapter_digest") == record.get("sent")
        rows.append(
            [
                Cell(str(step), step),
                Cell(str(record.get("sent", "–")), code=True),
                Cell(_short(held[0].get("adapter_digest")) if held else "–", good=equal, code=True),
                Cell(str(len(held)), len(held)),
            ]
        )
    columns = ["after step", "sent by the actor", "held by the rollout", "ranks"]
    return Table(f"Adapter, {run.label}", columns, rows, frozenset({0, 3}))


def _inside(record: Record) -> bool:
    interval, realised = record.get("sigma_interval"), finite(record.get("sigma_realised"))
    if not interval or realised is None:
        return False
    rounding = record.get("sigma_rounding") or 0.0
    return interval[0] - rounding <= realised <= interval[1] + rounding


def _interval(values: Sequence[float] | None) -> str:
    if not values or len(values) != 3:
        return "–"
    middle, low, high = (f"{value:.3g}" for value in values)
    return f"{middle} [{low}, {high}]"


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "–"
