"""Compare the arms of an experiment with its control: tests, intervals, and a verdict that the data support."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from verl_aqn.runs.provenance import unknown_code
from verl_aqn.runs.stats.arms import Arm, differences
from verl_aqn.runs.stats.crossed import Spread, seeds_needed, spread
from verl_aqn.runs.stats.intervals import score_interval
from verl_aqn.runs.stats.paired import LEVEL, Changes, Difference, Strictest, of_items

WANTED = 0.05  # a smaller difference does not matter: 5 points
# The number of runs per arm from which equal seeds are paired. With fewer runs, pairing costs more degrees of freedom
# (with three runs, the interval is half as wide again) than equal seeds usually gain.
PAIRS = 5
HELPS, HURTS, UNKNOWN = "helps", "hurts", "not enough data"
SAME = f"equivalent within ±{100 * WANTED:.0f} points"


@dataclass(frozen=True)
class Score:
    """An arm's mean accuracy (or avg@k, pass@k) with its 95 % interval; all are fractions of 1.

    With one seed the interval is `score_interval`, over items alone. With several seeds it spans both `score_interval`
    and the interval of `spread`, which is over seeds and items.
    """

    arm: str
    runs: tuple[str, ...]
    seeds: tuple[Any, ...]
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Contrast:
    """The arm of `score` minus `control`, on the same items; fractions of 1.

    `interval` and `p_value` are for this difference alone, at 95 % and 5 %. `simultaneous` and `corrected` are from the
    same test after Bonferroni's correction over all contrasts and looks (95 % for all intervals together), and they
    decide the verdict: `corrected` is below 5 % exactly when `simultaneous` excludes 0. p is None if one arm has
    several seeds and the other has one: then neither runs nor methods can be tested, and the interval is over items
    alone.

    `seeds_for_verdict`: the number of seeds per arm with which `simultaneous` would be at most ±2.5 points wide, if
    seeds and items vary as they did here. Then there is a verdict for any difference, because an interval that contains
    0 lies within ±5. None if no number of seeds is enough. With one seed the number is a lower bound, which assumes
    that seeds do not differ at all.
    """

    score: Score
    control: str
    differs: dict[str, tuple[Any, Any]]
    difference: float
    interval: tuple[float, float]
    simultaneous: tuple[float, float]
    test: str
    p_value: float | None
    corrected: float | None
    seeds_for_verdict: int | None
    verdict: str
    text: str


@dataclass(frozen=True)
class Report:
    """Arms compared with others on `items` items.

    `control` is the first of all arms, `arms` are the requested contrasts. `metric`: what was compared, for example
    accuracy, avg@8 or pass@4. `looks`: how often the data may be looked at before they are complete, and at the end.
    `unknown_code`: the number of runs whose code is not that of a recorded commit.
    """

    items: int
    metric: str
    control: Score
    scores: tuple[Score, ...]
    arms: tuple[Contrast, ...]
    looks: int = 1
    unknown_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def caution(self) -> str:
        """Return a sentence about runs whose code is not known, or ""."""
        if not self.unknown_code:
            return ""
        runs = sum(len(score.runs) for score in self.scores)
        return (
            f"It cannot be checked that these runs had the same code: {self.unknown_code} of {runs} have no commit on "
            "record, or had changes that were not committed."
        )

    @property
    def correction(self) -> str:
        """Return the note that a table needs about corrected intervals and p values, or "" if there is one of them."""
        tests = _tests(len(self.arms), self.looks)
        return (
            f"; differences and p corrected for {tests}, so that all intervals together hold at 95 %" if tests else ""
        )


def _tests(contrasts: int, looks: int) -> str:
    """Return in words what intervals are corrected for, or "" for a single contrast at a single look."""
    if contrasts * looks == 1:
        return ""
    return f"{contrasts} contrast{'s' if contrasts > 1 else ''}{f' at {looks} looks' if looks > 1 else ''}"


def compare(arms: Sequence[Arm], pairs: Sequence[tuple[Arm, Arm]] = (), looks: int = 1) -> Report:
    """Compare each arm after the first with the first, which is the control; or only the given `pairs` (arm, control).

    With one seed each, the test is `of_items` (McNemar's test for right and wrong responses). With several seeds each,
    it is the test of `spread` over seeds and items, paired if both arms have the same seeds and at least `PAIRS` of
    them, together with `of_items`. The verdict is about the method, so it needs at least two seeds per arm: another
    seed may behave differently. The interval, corrected over the contrasts (Bonferroni), decides, so that in 95 % of
    comparisons no verdict is wrong. If the data are looked at several times, as soon as there are so many seeds, and a
    look may end the experiment, then `looks` is their number, and the correction is over these, too.

    - helps, hurts: it excludes 0.
    - equivalent within ±5 points: it lies within ±5 points (two one-sided tests: Schuirmann 1987).
    - not enough data: neither.
    """
    pairs = pairs or [(arm, arms[0]) for arm in arms[1:]]
    scores = {arm.name: _score(arm) for arm in arms}
    contrasts = tuple(_contrast(arm, control, scores[arm.name], len(pairs), looks) for arm, control in pairs)
    first = arms[0]
    versions = [
        {key: run.settings.get(f"versions.{key}") for key in ("commit", "dirty")} for arm in arms for run in arm.runs
    ]
    unknown = sum(bool(unknown_code(one)) for one in versions)
    every = tuple(scores.values())
    return Report(first.scores.shape[1], first.metric, scores[first.name], every, contrasts, looks, unknown)


def decide(interval: tuple[float, float]) -> str:
    """Return the verdict for an interval of a difference between methods, in fractions of 1."""
    low, high = interval
    if low > 0 or high < 0:
        return HELPS if low > 0 else HURTS
    return SAME if max(-low, high) <= WANTED else UNKNOWN


def _score(arm: Arm) -> Score:
    low, high = score_interval(arm.scores.mean(0), sum(run.answers.samples for run in arm.runs))
    if len(arm.scores) > 1:
        ends = spread(arm.scores).interval()
        low, high = min(low, ends[0]), max(high, ends[1])
    runs, numbers = tuple(str(run.path) for run in arm.runs), tuple(run.seed for run in arm.runs)
    return Score(arm.name, runs, numbers, float(arm.scores.mean()), (max(low, 0.0), min(high, 1.0)))


def _contrast(arm: Arm, control: Arm, score: Score, contrasts: int, looks: int) -> Contrast:
    several = min(len(arm.runs), len(control.runs)) > 1
    tested = several or len(arm.runs) == len(control.runs)
    tests, level = _tests(contrasts, looks), LEVEL / (contrasts * looks)
    found, test = _difference(arm, control)
    differs = differences(control.settings, arm.settings)
    simultaneous = _within(found.interval(level))
    verdict = decide(simultaneous) if several else UNKNOWN
    corrected = min(1.0, contrasts * looks * found.p_value) if tested else None
    seeds = min(len(arm.runs), len(control.runs))
    needed = _needed(found, arm.scores.shape[1], level)
    if needed is not None and verdict == UNKNOWN and 1 < needed <= seeds:
        needed = None  # this many seeds were run already: the number of items is too small
    changes = [f"{key} {_short(was)} → {_short(now)}" for key, (was, now) in differs.items()]
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    low, high = (100 * bound for bound in simultaneous)
    text = f"{arm.name} against {control.name}: {verdict}. {100 * found.value:+.1f} points "
    text += f"(95 % interval{f', corrected for {tests},' if tests else ''} {low:+.1f} to {high:+.1f}"
    text += f"; {test}, p = {corrected:.2g}). " if corrected is not None else "). "
    text += _reason(verdict, several, corrected, needed)
    text += f"What differs: {', '.join(changes[:4])}{more}."
    return Contrast(
        score, control.name, differs, found.value, _within(found.interval()), simultaneous, test if tested else "none",
        found.p_value if tested else None, corrected, needed, verdict, text,
    )  # fmt: skip


def _difference(arm: Arm, control: Arm) -> tuple[Difference, str]:
    """Return the difference with its test and interval, and the name of the test.

    With several seeds, the test combines `spread` with the test over items. If few items changed and the seeds agree on
    nearly all of them, the t-distribution of `spread` does not fit so few changes and its interval is too narrow (100
    items of which 5 % are gained: "equivalent" in up to 13 % of cases, where it should be 2.5 %).
    """
    over_items = of_items(arm.scores.mean(0) - control.scores.mean(0))
    if min(len(arm.runs), len(control.runs)) > 1:
        treated, base, how = _tables(arm, control)
        return Strictest((spread(treated, base), over_items)), how
    whole = all(np.isin(one.scores, (0, 1)).all() for one in (arm, control))
    return over_items, "McNemar" if whole else "score test over items"


def _needed(found: Difference, items: int, level: float) -> int | None:
    """Return the seeds per arm that make the interval at most ±2.5 points wide, according to `spread` alone."""
    if isinstance(found, Strictest):
        crossed = next(part for part in found.parts if isinstance(part, Spread))
        return seeds_needed(crossed.shared, crossed.per_seed, items, WANTED / 2, crossed.residual, level)
    # One run each does not show the effect of the seed. The lower bound assumes that the seed has no effect.
    assert isinstance(found, Changes)
    variance = (found.gained + found.lost + 1) / (found.items + 2) / found.items
    return seeds_needed(0.0, [variance / 2] * 2, items, WANTED / 2, level=level)


def _tables(arm: Arm, control: Arm) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Return the arguments of `spread` for two arms, and the name of its test.

    Runs with the same seed share the order of the data, the initial adapter and the noise draws, so their results are
    correlated. Whether they are paired depends only on the design, never on the results.
    """
    by_seed = [dict(zip((run.seed for run in one.runs), one.scores, strict=True)) for one in (arm, control)]
    seeds = by_seed[0].keys()
    if seeds != by_seed[1].keys() or len(seeds) < PAIRS:
        return arm.scores, control.scores, "seeds crossed with items"
    treated, base = (np.array([rows[seed] for seed in seeds], dtype=float) for rows in by_seed)
    return treated - base, None, "pairs of seeds crossed with items"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-19:]}"


def _within(interval: tuple[float, float]) -> tuple[float, float]:
    return max(interval[0], -1.0), min(interval[1], 1.0)


def _reason(verdict: str, several: bool, corrected: float | None, needed: int | None) -> str:
    """Return why there is no verdict and what would help, or "" if there is a verdict."""
    if verdict != UNKNOWN:
        return ""
    if not several:
        least = f"at least {needed} seeds an arm" if needed else "more items"
        would = f"A verdict needs {least}. "
        if corrected is None:
            return f"One of the arms has only one seed: the interval does not include how much its seeds vary. {would}"
        differ = "differ" if corrected < LEVEL else "do not differ"
        return (
            f"These two runs {differ} beyond chance on these items, but each arm has only one seed: the "
            f"interval does not include how much seeds vary, so it says nothing about the method. {would}"
        )
    why = f"The interval neither excludes 0 nor lies within ±{100 * WANTED:.0f} points"
    if needed is None:
        return f"{why}; a verdict needs more items, whatever the number of seeds. "
    return (
        f"{why}; {needed} seeds an arm would narrow it to ±{50 * WANTED:g} points, which gives a verdict in any case. "
    )


def table(report: Report) -> Table:
    """Return a table with a row for each arm and the control it was compared with, in points of 100.

    An arm has one more row for each further control.
    """
    title = f"Last validation, {report.items} items that all were asked{report.correction}"
    view = Table(title=title, title_justify="left")
    view.add_column("arm")
    for column in ("seeds", f"{report.metric}, %", "against", "difference, points", "p", "verdict"):
        view.add_column(column, justify="left" if column in ("against", "verdict") else "right")
    for score in report.scores:
        row = [escape(score.arm), str(len(score.runs)), _interval(score.accuracy, score.interval, ".1f")]
        contrasts = [contrast for contrast in report.arms if contrast.score.arm == score.arm]
        if not contrasts:
            view.add_row(*row)
        for contrast in contrasts:
            view.add_row(
                *row,
                escape(contrast.control),
                _interval(contrast.difference, contrast.simultaneous, "+.1f"),
                "–" if contrast.corrected is None else f"{contrast.corrected:.2g}",
                contrast.verdict,
            )
            row = ["", "", ""]
    return view


def _interval(value: float, interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return escape(f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]")
