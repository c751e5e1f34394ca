"""Arms of an experiment against its control: tests, intervals, and a verdict that claims no more than the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from verl_aqn.runs.arms import Arm, differences
from verl_aqn.runs.crossed import LEVEL, bootstrap, detectable, detectable_by_pairs, holm, seeds_needed, spread
from verl_aqn.runs.stats import wilson
from verl_aqn.runs.verdict import compare_before_after

WANTED = 0.05  # a difference that a comparison should be able to find: 5 points
# Runs an arm from which equal seeds are paired: of fewer, the degrees of freedom that pairs cost (of three runs: an
# interval half as wide again) outweigh what equal seeds usually have in common.
PAIRS = 5

HELPS, HURTS, SAME, UNKNOWN = "helps", "hurts", "no significant difference", "not enough data"


@dataclass(frozen=True)
class Score:
    """An arm's mean accuracy with its 95 % interval; all fractions of 1.

    Of one seed: Wilson's, over items alone. Of several: `spread`'s, over both, unless all are right or wrong.
    """

    arm: str
    runs: tuple[str, ...]
    seeds: tuple[Any, ...]
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Contrast:
    """The arm of `score` less `control`, on the same items; fractions of 1.

    `interval` and `bootstrap` are 95 % and of this difference alone, not corrected for the number of arms. `interval`
    is `spread`'s over seeds and items; of one seed each Agresti and Min's over items; of one against several the
    bootstrap's.
    `p_value` is None where one arm has several seeds and the other one: neither runs nor methods can then be tested.
    `corrected` is `p_value` after Holm's correction over all contrasts. `detectable` is the difference found in 80 % of
    cases (of one run each, where an arm has one seed), so corrected: at 5 % over the number of tests. `seeds_needed`:
    an arm, to find 5 points, so corrected; None where no number would do. With one seed it is the least, as if seeds
    did not differ at all.
    """

    score: Score
    control: str
    differs: dict[str, tuple[Any, Any]]
    difference: float
    interval: tuple[float, float]
    bootstrap: tuple[float, float]
    test: str
    p_value: float | None
    corrected: float | None
    detectable: float
    seeds_needed: int | None
    verdict: str
    text: str


@dataclass(frozen=True)
class Report:
    """Arms against others on `items` items. `control` is the first of all arms, `arms` are the contrasts asked for."""

    items: int
    control: Score
    scores: tuple[Score, ...]
    arms: tuple[Contrast, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def correction(self) -> str:
        """What a table of this has to say of `corrected` and `detectable`; "" of a single test."""
        tests = sum(arm.p_value is not None for arm in self.arms)
        return f"; p and found in 80 % corrected for {tests} tests" if tests > 1 else ""


def compare(arms: Sequence[Arm], pairs: Sequence[tuple[Arm, Arm]] = ()) -> Report:
    """Each arm after the first against the first, which is the control; or the `pairs` (arm, control) and no others.

    One seed each: exact McNemar test. Several each: `spread`'s test over seeds and items (McNemar's where nothing
    varies), of pairs where both arms have the same seeds and `PAIRS` or more of them. The verdict is about the method,
    so it takes two seeds an arm at least: what one does, another need not.

    - helps, hurts: p after Holm's correction is below 5 %.
    - no significant difference: it is not, and a difference of 5 points would have been found in 80 % of cases, at the
      level of Holm's first step (5 % over the number of tests).
    - not enough data: neither.
    """
    pairs = pairs or [(arm, arms[0]) for arm in arms[1:]]
    level = LEVEL / max(sum(_is_tested(*pair) for pair in pairs), 1)
    tests = [_test(arm, control, level) for arm, control in pairs]
    known = [index for index, test in enumerate(tests) if test["p_value"] is not None]
    corrected = dict(zip(known, holm([tests[index]["p_value"] for index in known]), strict=True))
    scores = {arm.name: _score(arm) for arm in arms}
    contrasts = []
    for index, ((arm, control), test) in enumerate(zip(pairs, tests, strict=True)):
        p = corrected.get(index)
        several = min(len(arm.runs), len(control.runs)) > 1
        if not several:
            verdict = UNKNOWN
        elif p is not None and p < LEVEL:
            verdict = HELPS if test["difference"] > 0 else HURTS
        else:
            verdict = SAME if test["detectable"] <= WANTED else UNKNOWN
        differs = differences(control.settings, arm.settings)
        changes = [f"{key} {_short(was)} → {_short(now)}" for key, (was, now) in differs.items()]
        more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
        text = f"{arm.name} against {control.name}: {verdict}. {_sentence(test, p, len(known), verdict, several)}"
        text += f" What differs: {', '.join(changes[:4])}{more}."
        score = scores[arm.name]
        contrasts.append(Contrast(score, control.name, differs, corrected=p, verdict=verdict, text=text, **test))
    return Report(arms[0].right.shape[1], scores[arms[0].name], tuple(scores.values()), tuple(contrasts))


def _score(arm: Arm) -> Score:
    seeds, items = arm.right.shape
    if seeds > 1 and (found := spread(arm.right)).error > 0:
        low, high = found.interval()
    else:
        low, high = wilson(int(arm.right[0].sum()), items)
    runs, numbers = tuple(str(run.path) for run in arm.runs), tuple(run.seed for run in arm.runs)
    return Score(arm.name, runs, numbers, float(arm.right.mean()), (max(low, 0.0), min(high, 1.0)))


def _is_tested(arm: Arm, control: Arm) -> bool:
    """Not where one has several seeds and the other one: then neither runs nor methods can be tested."""
    return (len(arm.runs) > 1) == (len(control.runs) > 1)


def _test(arm: Arm, control: Arm, level: float) -> dict[str, Any]:
    items = arm.right.shape[1]
    treated, base, how = _tables(arm, control)
    drawn = bootstrap(treated, base)
    difference = float(arm.right.mean() - control.right.mean())
    result = {"difference": difference, "interval": drawn, "bootstrap": drawn, "p_value": None}
    several = min(len(arm.runs), len(control.runs)) > 1
    if several and (found := spread(treated, base)).error > 0:
        low, high = found.interval()
        return result | {
            "test": how,
            "interval": (max(low, -1.0), min(high, 1.0)),
            "p_value": found.p_value,
            "detectable": detectable(found.error, found.freedom, level),
            "seeds_needed": seeds_needed(found.shared, found.per_seed, items, WANTED, found.residual, level),
        }
    # Of one run each it cannot be said what the seed did: that it did nothing is the least there can be.
    pairs = compare_before_after(control.right[0], arm.right[0])
    reach = detectable_by_pairs(pairs.gained, pairs.lost, items, level)
    unlike = (pairs.gained + pairs.lost + 1) / (items + 2)
    needed = seeds_needed(0.0, [unlike / items / 2] * 2, items, WANTED, level=level)
    if several:
        # All seeds agree and all items changed alike: items then decide, by their number, and no more seeds would.
        needed = 2 if reach <= WANTED else None
    result |= {"detectable": reach, "seeds_needed": needed}
    if _is_tested(arm, control):
        return result | {"test": "exact McNemar", "interval": pairs.interval, "p_value": pairs.p_value}
    return result | {"test": "none"}


def _tables(arm: Arm, control: Arm) -> tuple[np.ndarray, np.ndarray | None, str]:
    """What `spread` takes of two arms, and the name of its test.

    Runs of one seed share the order of the data, the first adapter and the draws of noise, so that they move together.
    To pair them depends on the design alone, never on what was found.
    """
    by_seed = [dict(zip((run.seed for run in one.runs), one.right, strict=True)) for one in (arm, control)]
    seeds = by_seed[0].keys()
    if seeds != by_seed[1].keys() or len(seeds) < PAIRS:
        return arm.right, control.right, "seeds crossed with items"
    treated, base = (np.array([rows[seed] for seed in seeds], dtype=float) for rows in by_seed)
    return treated - base, None, "pairs of seeds crossed with items"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-19:]}"


def _sentence(test: dict[str, Any], p: float | None, tests: int, verdict: str, several: bool) -> str:
    low, high = (100 * bound for bound in test["interval"])
    correction = f" after Holm's correction for {tests} tests" if tests > 1 else ""
    so = " with that correction" if p is not None and tests > 1 else ""
    found = f"{100 * test['difference']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}"
    found += f"; {test['test']}, p = {p:.2g}{correction})" if p is not None else ")"
    needed = test["seeds_needed"]
    if not several:
        least = f"at least {needed} seeds an arm" if needed else "more items"
        find = f"To find a difference of 5 points{so} takes {least}."
        if p is None:
            return f"{found}. One of the arms has one seed: how far its seeds differ is not in the interval. {find}"
        differ = "differ" if p < LEVEL else "do not differ"
        return (
            f"{found}. These two runs {differ} beyond chance on these items, but each arm has one seed: how far seeds "
            f"differ is not in the interval, so it says nothing about the method. {find}"
        )
    if verdict in (HELPS, HURTS):
        return f"{found}."
    smallest = f"Differences of {100 * test['detectable']:.1f} points are found in 80 % of cases{so}"
    if test["detectable"] > 1:
        smallest = f"Not even a difference of 100 points is sure to be found{so}"
    if verdict == SAME:
        return f"{found}. {smallest}; smaller ones may be there."
    more = f"{needed} seeds an arm" if needed else "more items, however many the seeds"
    return f"{found}. {smallest}; to find 5 points takes {more}."


def table(report: Report) -> Table:
    """An arm a row, with what it was held against: a row more for each further control; points of 100."""
    title = f"Last validation, {report.items} items answered by all{report.correction}"
    view = Table(title=title, title_justify="left")
    view.add_column("arm")
    for column in ("seeds", "accuracy, %", "against", "difference, points", "bootstrap", "p", "found in 80 %"):
        view.add_column(column, justify="left" if column == "against" else "right")
    for score in report.scores:
        row = [escape(score.arm), str(len(score.runs)), _interval(score.accuracy, score.interval, ".1f")]
        contrasts = [contrast for contrast in report.arms if contrast.score.arm == score.arm]
        if not contrasts:
            view.add_row(*row)
        for contrast in contrasts:
            low, high = contrast.bootstrap
            view.add_row(
                *row,
                escape(contrast.control),
                _interval(contrast.difference, contrast.interval, "+.1f"),
                f"{100 * low:+.1f}, {100 * high:+.1f}",
                "–" if contrast.corrected is None else f"{contrast.corrected:.2g}",
                f"{100 * contrast.detectable:.1f}",
            )
            row = ["", "", ""]
    return view


def _interval(value: float, interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return escape(f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]")
