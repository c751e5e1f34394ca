"""Grouping of ranks with equal readings, so that records stay small with many ranks. Nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl_aqn.errors import EvidenceError

_ACTOR = {"actor": "packed", "actor_digests": "digest", "actor_activations": "activations"}
_BESIDE = ("holders", "converted", "left")


def grouped(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the distinct values among ``answers`` (plain JSON values, by rank), each with the `ranks` that gave it."""
    ranks: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        ranks.setdefault(json.dumps(answer, sort_keys=True, default=lambda scalar: scalar.item()), []).append(rank)
    return [{"ranks": of, **answers[of[0]]} for of in ranks.values()]


def by_rank(groups: Iterable[Mapping[str, Any]], what: str) -> list[dict[str, Any]]:
    """Return the answer of every rank, in the order of ranks: the inverse of `grouped`.

    ``what``: the side, for the message.

    Raises:
        EvidenceError: a rank is missing or occurs twice.
    """
    found: dict[int, dict[str, Any]] = {}
    count = 0
    for group in groups:
        answer = {key: value for key, value in group.items() if key != "ranks"}
        for rank in group["ranks"]:
            found[rank], count = answer, count + 1
    if count != len(found) or any(type(rank) is not int or not 0 <= rank < count for rank in found):
        raise EvidenceError(f"a rank of the {what} is missing or occurs twice: ranks {sorted(map(str, found))[:8]}")
    return [found[rank] for rank in range(count)]


def grouped_base(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of the base in the form that is written to the file: ranks with equal values are one entry.

    `actor_ranks` and `rollout_ranks` replace the lists `actor`, `actor_digests`, `actor_activations` and `rollout`, and
    the entries for "rollout 0", … in `holders`, `converted` and `left`. `rank_counts` replaces `ranks`, because `ranks`
    is a list in other records.
    """
    told = {short: record[key] for key, short in _ACTOR.items() if key in record}
    actor = [dict(zip(told, values, strict=True)) for values in zip(*told.values(), strict=True)]
    rollout = [
        {**one, **{key: record[key][f"rollout {rank}"] for key in _BESIDE}}
        for rank, one in enumerate(record["rollout"])
    ]
    rest = {key: value for key, value in record.items() if key not in (*_ACTOR, "rollout", "ranks", *_BESIDE)}
    return {
        **rest,
        "rank_counts": record["ranks"],
        **{key: {"actor": record[key]["actor"]} for key in _BESIDE},
        "actor_ranks": grouped(actor),
        "rollout_ranks": grouped(rollout),
    }


def wide_base(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record of the base with an entry for every rank: the inverse of `grouped_base`.

    A record that has these entries already, as those of older versions, is returned unchanged.

    Raises:
        EvidenceError: a rank is missing or occurs twice.
    """
    if "rollout_ranks" not in record:
        return record
    actor = by_rank(record["actor_ranks"], "actor")
    rollout = by_rank(record["rollout_ranks"], "rollout")
    wide = {key: value for key, value in record.items() if key not in ("actor_ranks", "rollout_ranks", "rank_counts")}
    wide["ranks"] = record.get("rank_counts")
    for key, short in _ACTOR.items():
        if any(short in one for one in actor):
            wide[key] = [one[short] for one in actor]
    wide["rollout"] = [{key: value for key, value in one.items() if key not in _BESIDE} for one in rollout]
    for key in _BESIDE:
        wide[key] = {**record[key], **{f"rollout {rank}": one[key] for rank, one in enumerate(rollout)}}
    return wide
