"""Which of verl's figures of a step are shown: those that say what their name says; see docs/metrics.md."""

from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

DROPPED = {
    "perf/mfu/*": "counts the work of full training on dense weights, against a peak that verl does not know of a CPU",
    "actor/mfu": "as perf/mfu",
    "*/perf/cpu_memory_used_gb": "is the memory in use on the whole machine, by anybody",
    "*/perf/max_memory_reserved_gb": "is equal to max_memory_allocated_gb on a CPU",
    "prompt_length/clip_ratio": "is the share of prompts as long as the batch's longest; prompts are never cut",
    "response_length_non_aborted/*": "repeats response_length: the synchronous trainer aborts no answer",
    "response/aborted_ratio": "is the share of empty answers; the synchronous trainer aborts none",
    "training/off_policy/*": "is the same in every step of the synchronous trainer",
    "training/rollout_probs_diff_valid": "is 1 wherever the figures beside it are there",
    "num_turns/*": "repeats training/num_turns",
}
"""By pattern of names, why a figure is not shown."""

KEPT_ON_DEVICES = ("*/perf/max_memory_reserved_gb",)


def drop_meaningless(metrics: MutableMapping[str, Any], cpu: bool) -> None:
    """Take the figures out of `metrics` that `DROPPED` names. `cpu`: the actor has no device memory of its own."""
    patterns = [pattern for pattern in DROPPED if cpu or pattern not in KEPT_ON_DEVICES]
    for name in [name for name in metrics if any(fnmatchcase(name, pattern) for pattern in patterns)]:
        del metrics[name]


def cut_share(lengths: Any, longest: int) -> float:
    """Return the share of answers that were cut off: as long as `data.max_response_length` lets them be.

    verl's `response_length/clip_ratio` is the share of answers that are as long as the longest of their batch.
    """
    return (lengths >= longest).double().mean().item()


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those of a step's metrics that are numbers."""
    found = {}
    for name, value in metrics.items():
        with suppress(TypeError, ValueError):
            found[name] = float(value)
    return found
