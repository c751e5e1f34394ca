"""Write one self-contained page about runs. The page loads nothing, and text written by a model is never executed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from verl_aqn import __version__
from verl_aqn.errors import AqnError, ConfigError, EnvironmentFault, reason, remedy
from verl_aqn.runs.report import evidence_section as evidence
from verl_aqn.runs.report import sections
from verl_aqn.runs.report.answers import read_answers
from verl_aqn.runs.report.page_data import Run, read_runs
from verl_aqn.runs.report.tables import Cell, Table, chart_table
from verl_aqn.runs.run_list import sigmas
from verl_aqn.runs.stats.arms import FACTOR, arms, is_seed_or_place
from verl_aqn.runs.stats.compare import Report, compare
from verl_aqn.runs.stats.intervals import share_text
from verl_aqn.runs.stats.verdict import compare_validations

ANSWERS = 24
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    paths: Sequence[Path],
    dst: Path,
    factors: Iterable[str] = (FACTOR,),
    any_difference: bool = False,
    answers: int = ANSWERS,
) -> int:
    """Write the page about the runs in `paths` to the new file `dst`, and return its size in bytes.

    `factors` and `any_difference` are as in `verl_aqn.runs.stats.arms.arms`; runs that cannot be compared are shown
    too, with the reason. `answers`: the number of problems that are shown with their responses.

    Raises:
        ConfigError: `dst` exists, or a run is given twice.
        EnvironmentFault: `dst` cannot be written.
        DataError: a path contains no run, or one of its records is damaged.
    """
    check_free(dst)
    page = render(read_runs(paths), list(factors), any_difference, answers).encode(errors="replace")
    try:
        with dst.open("xb") as file:
            file.write(page)
    except FileExistsError:
        check_free(dst)
        raise
    except OSError as error:
        dst.unlink(missing_ok=True)  # remove the incomplete page
        raise EnvironmentFault(
            f"cannot write {dst} ({reason(error)}): {remedy(error) or 'give another file with -o'}"
        ) from error
    return len(page)


def check_free(dst: Path) -> None:
    """Raise ConfigError unless a new file can be made at `dst`."""
    if dst.exists() or dst.is_symlink():
        raise ConfigError(f"{dst} exists and is not overwritten: remove it, or give another file with -o")
    if not dst.absolute().parent.is_dir():
        raise ConfigError(f"{dst.parent} is not a folder: create it, or give another file with -o")


def render(runs: Sequence[Run], factors: list[str], any_difference: bool, answers: int) -> str:
    """Return the page as text."""
    together, missing_together = sections.draw(sections.TOGETHER, runs)
    training, missing_training = sections.draw(sections.TRAINING, runs)
    together += sections.draw(sections.CONTROL, runs)[0]
    training += sections.draw(sections.TOOLS, runs)[0]
    mismatch, missing_mismatch = sections.draw(sections.MISMATCH, runs)
    accuracy, accuracies = sections.accuracy(runs)
    bases, without_base = sections.bases(runs)
    spent, phases, seconds = sections.times(runs)
    deviation = evidence.deviation(runs)
    drawn = [accuracy, *together, *training, *mismatch, deviation, *(base.chart for base in bases), seconds]
    script = (_TEMPLATES / "report.js").read_text()
    return _environment().get_template("report.html").render(
        title=_title(runs),
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        overview=overview(runs),
        notes=notes(runs),
        accuracy=accuracy,
        accuracies=accuracies,
        changes=changes(runs),
        comparison=comparison(runs, factors, any_difference),
        together=together,
        training=training,
        missing_training=missing_together + missing_training,
        mismatch=mismatch,
        missing_mismatch=missing_mismatch,
        checks=evidence.checks(runs),
        deviation=deviation,
        readings=[(run, [evidence.noise_table(run), evidence.adapter_table(run)]) for run in runs],
        bases=bases,
        without_base=without_base,
        spent=spent,
        phases=phases,
        seconds=seconds,
        answers=read_answers(runs, answers),
        differing=differing(runs),
        settings=settings(runs),
        data={chart.key: chart.data for chart in drawn if chart},
        style=Markup((_TEMPLATES / "report.css").read_text()),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def _title(runs: Sequence[Run]) -> str:
    if len(runs) < 3:
        return " and ".join(run.label for run in runs)
    names = list(dict.fromkeys(str(run.summary["recipe"] or run.label) for run in runs))
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:4])} and {len(names) - 4} more"


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["chart_table"] = chart_table
    return environment


def overview(runs: Sequence[Run]) -> Table:
    """Tabulate what each run is and how it ended."""
    rows = []
    for run in runs:
        one, versions = run.summary, run.settings
        noise = one["noise"] or {}
        commit = str(versions.get("versions.commit") or "–")[:7] + (
            " + changes" if versions.get("versions.dirty") else ""
        )
        good = {"finished": True, "running": None}.get(one["status"], False)
        rows.append(
            [
                Cell(run.label, colour=run.colour),
                Cell(one["status"], good=good),
                Cell(f"{one['step']}/{one['steps'] or '?'}", one["step"]),
                Cell(share_text(one["accuracy"], one["items"], " %"), one["accuracy"]),
                Cell(sigmas(noise), noise.get("sigma_start")),
                Cell(f"{one['minutes']:g}", one["minutes"]),
                Cell(str(versions.get("versions.device") or "–")),
                Cell(commit, code=True),
                Cell(one["run"], code=True),
            ]
        )
    columns = ["run", "status", "steps", "accuracy [95 %]", "σ", "minutes", "device", "commit", "folder"]
    return Table("Runs", columns, rows, frozenset({2, 5}))


def notes(runs: Sequence[Run]) -> list[str]:
    """Return notes about each run: why it ended, how often it was resumed, its warnings."""
    found = []
    for run in runs:
        if message := run.summary["message"]:
            found.append(f"{run.label}: {message}")
        elif run.summary["status"] == "dead":
            found.append(f"{run.label} is recorded as running, but no process runs it: it was killed")
        if (run.summary["attempt"] or 1) > 1:
            found.append(f"{run.label} was resumed: {run.summary['attempt']} attempts")
        warned = [str(one.get("text")) for one in run.events if one.get("kind") == "warning"]
        found += [f"{run.label}: {text}" for text in dict.fromkeys(warned)]
    return found


def changes(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Return the paired comparison of the first with the last validation, for each run with two validations."""
    found = []
    for run in runs:
        if len(run.answered) < 2:
            continue
        first, last = run.answered[0], run.answered[-1]
        if change := compare_validations(run.folder, first, last):
            found.append((run, f"steps {first} to {last}: {change.text}"))
    return found


def comparison(runs: Sequence[Run], factors: list[str], any_difference: bool) -> dict[str, Any]:
    """Return the result of `compare` as a table and sentences, or the reason why there is none."""
    if len(runs) < 2:
        return {"reason": ""}
    try:
        report = compare(arms([run.folder.path for run in runs], factors, any_difference))
    except AqnError as error:
        return {"reason": str(error)}
    sentences = [arm.text for arm in report.arms] + ([report.caution] if report.caution else [])
    return {"reason": "", "table": _arms(report), "sentences": sentences}


def _arms(report: Report) -> Table:
    def points(value: float, ends: tuple[float, float], form: str) -> Cell:
        low, high = ends
        return Cell(f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]", value)

    control = report.control
    rows = [
        [Cell(f"{control.arm} (control)"), Cell(str(len(control.runs)), len(control.runs)),
         points(control.accuracy, control.interval, ".1f"), *[Cell("–")] * 3]
    ]  # fmt: skip
    for arm in report.arms:
        rows.append(
            [
                Cell(arm.score.arm),
                Cell(str(len(arm.score.runs)), len(arm.score.runs)),
                points(arm.score.accuracy, arm.score.interval, ".1f"),
                points(arm.difference, arm.simultaneous, "+.1f"),
                Cell("–" if arm.corrected is None else f"{arm.corrected:.2g}", arm.corrected),
                Cell(arm.verdict),
            ]
        )
    columns = ["arm", "seeds", f"{report.metric}, %", "difference, points", "p", "verdict"]
    caption = (
        f"Last validation, {report.items} problems that all were asked; 95 % intervals in brackets{report.correction}"
    )
    return Table(caption, columns, rows, frozenset(range(1, 5)))


def differing(runs: Sequence[Run]) -> Table | None:
    """Tabulate settings and versions that differ between runs, without folders and names; None for one run."""
    if len(runs) < 2:
        return None
    rows = []
    for key in sorted({key for run in runs for key in run.settings}):
        values = [_value(run.settings, key) for run in runs]
        seed = key.rsplit(".", 1)[-1].endswith("seed")
        if len(set(values)) > 1 and (seed or not is_seed_or_place(key)):
            rows.append([Cell(key, code=True), *(Cell(value) for value in values)])
    return Table("Settings that differ", ["key", *(run.label for run in runs)], rows)


def settings(runs: Sequence[Run]) -> Table:
    """Tabulate every setting of every run, and the versions of packages."""
    keys = sorted({key for run in runs for key in run.settings}, key=lambda key: (not key.startswith("aqn."), key))
    rows = [[Cell(key, code=True), *(Cell(_value(run.settings, key)) for run in runs)] for key in keys]
    return Table("All settings", ["key", *(run.label for run in runs)], rows)


def _value(found: dict[str, Any], key: str) -> str:
    if key not in found:
        return "–"
    return "null" if found[key] is None else str(found[key])
