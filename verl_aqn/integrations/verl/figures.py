"""Selection of verl's metrics of a step: metrics that do not measure what their name says are dropped.

See docs/metrics.md.
"""

from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

DROPPED = {
    "perf/mfu/*": "counts the work of full training on dense weights, relative to a peak that verl lacks for a CPU",
    "actor/mfu": "is the same as perf/mfu",
    "*/perf/cpu_memory_used_gb": "is the memory that all processes of the machine use",
    "*/perf/max_memory_reserved_gb": "is equal to max_memory_allocated_gb on a CPU",
    "prompt_length/clip_ratio": "is the share of prompts as long as the batch's longest; prompts are never cut",
    "response_length_non_aborted/*": "repeats response_length: the synchronous trainer aborts no response",
    "response/aborted_ratio": "is the share of empty responses; the synchronous trainer aborts none",
    "training/off_policy/*": "is the same in every step of the synchronous trainer",
    "training/rollout_probs_diff_valid": "is always 1 if the related metrics exist",
    "num_turns/*": "repeats training/num_turns",
}
"""Patterns of the names of metrics that are not shown, with the reasons."""

KEPT_ON_DEVICES = ("*/perf/max_memory_reserved_gb",)


def drop_meaningless(metrics: MutableMapping[str, Any], cpu: bool) -> None:
    """Remove the metrics that `DROPPED` names from `metrics`. `cpu`: the actor runs on a CPU, without device memory."""
    patterns = [pattern for pattern in DROPPED if cpu or pattern not in KEPT_ON_DEVICES]
    for name in [name for name in metrics if any(fnmatchcase(name, pattern) for pattern in patterns)]:
        del metrics[name]


def cut_share(lengths: Any, longest: int) -> float:
    """Return the share of responses that were cut off, that is, have the length `longest` (data.max_response_length).

    verl's `response_length/clip_ratio` is instead the share of responses that are as long as the longest in the batch.
    """
    return (lengths >= longest).double().mean().item()


def numbers_in(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a step that are numbers."""
    found = {}
    for name, value in metrics.items():
        with suppress(TypeError, ValueError):
            found[name] = float(value)
    return found
