"""Measure how many responses of two runs are identical, step by step.

Usage: `python -m verl_aqn.runs.stats.agreement RUN RUN`.

Two runs with the same seed and recipe differ only because of floating-point rounding. The two runs of a pair in a plan
share random numbers, and the noise makes them differ.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from verl_aqn.errors import AqnError, DataError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.samples import FILE, samples_of


@dataclass(frozen=True)
class Agreement:
    """How many responses of two runs after `step` are identical (same tokens or same text), in `part` (`train`, `val`).

    `answers`: responses that at least one of the runs has. `common`: responses to the same prompt and sample in both
    runs. `equal`: identical responses. `accuracies`: the accuracies of both runs, for a validation.
    """

    part: str
    step: int
    answers: int
    common: int
    equal: int
    accuracies: tuple[float, float] | None = None

    @property
    def share(self) -> float:
        """Return identical responses as a fraction of all; a response that only one run has is not identical."""
        return self.equal / self.answers if self.answers else 0.0


def agreement(first: RunFolder, second: RunFolder) -> list[Agreement]:
    """Compare the recorded responses of two runs: training by step, then validations.

    Raises:
        DataError: a run has no recorded samples (older versions recorded none), or the runs have no step in common.
    """
    found = []
    samples = [samples_of(run) for run in (first, second)]
    for run, records in zip((first, second), samples, strict=True):
        if not records:
            raise DataError(
                f"{run.path} has no digests of its samples ({FILE}): it was made by an older version that did not "
                "record them"
            )
    for step in sorted(samples[0].keys() & samples[1].keys()):
        found.append(_compare("train", step, samples[0][step], samples[1][step]))
    validations = [run.by_step("metrics.jsonl", "validation") for run in (first, second)]
    for step in sorted(validations[0].keys() & validations[1].keys()):
        accuracies = (validations[0][step]["accuracy"], validations[1][step]["accuracy"])
        found.append(_compare("val", step, _texts(first, step), _texts(second, step), accuracies))
    if not found:
        raise DataError(f"{first.path} and {second.path} have no step in common")
    return found


def _texts(run: RunFolder, step: int) -> dict:
    lines = run.read(f"validation/{step}.jsonl")
    return {(line.get("item"), line.get("sample")): line["output"] for line in lines}


def _compare(
    part: str, step: int, first: dict, second: dict, accuracies: tuple[float, float] | None = None
) -> Agreement:
    common = first.keys() & second.keys()
    equal = sum(first[name] == second[name] for name in common)
    return Agreement(part, step, len(first.keys() | second.keys()), len(common), equal, accuracies)


def table(found: list[Agreement]) -> str:
    """Format the figures as lines of text."""
    lines = ["part   step  answers  common   equal   share  accuracies"]
    for one in found:
        told = "" if one.accuracies is None else " and ".join(f"{accuracy:.1%}" for accuracy in one.accuracies)
        lines.append(
            f"{one.part:<5}{one.step:>6}{one.answers:>9}{one.common:>8}{one.equal:>8}{one.share:>8.1%}  {told}".rstrip()
        )
    return "\n".join(lines)


def main(*paths: str) -> int:
    """Print the agreement of two run folders."""
    try:
        if len(paths) != 2:
            raise DataError("give two run folders: python -m verl_aqn.runs.stats.agreement RUN RUN")
        print(table(agreement(*(RunFolder(Path(path).expanduser()) for path in paths))))
    except AqnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
