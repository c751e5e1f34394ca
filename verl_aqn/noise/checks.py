"""Check that the noise that was measured in a worker is the noise that was ordered."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from verl_aqn.errors import EvidenceError
from verl_aqn.noise.spec import NoiseSpec

TOLERANCE = 1.2
"""σ in the weights may lie outside its sampling interval by up to this factor."""


def sigma_interval(sigma: float, n: int) -> tuple[float, float]:
    """Return the interval in which the root mean square of n draws of N(0, σ²) lies with 95 % probability.

    The bounds are σ · sqrt(χ²_n / n) at 2.5 % and 97.5 %, with Wilson and Hilferty's cube (1931) for the quantiles.
    They are within 0.5 % of the exact values at n = 10, and closer for larger n.
    """
    low, high = ((1 - 2 / (9 * n) + z * math.sqrt(2 / (9 * n))) ** 1.5 for z in (-1.959964, 1.959964))
    return sigma * low, sigma * high


def check_evidence(evidence: Mapping[str, Any], order: NoiseSpec | None, clean_digest: str) -> None:
    """Raise EvidenceError unless `evidence` is what `order` asks for (None: clean weights, as `restore` leaves them).

    `clean_digest` is the digest of the clean norms at the start of the run. σ is checked in every group of modules with
    the same multiplier. σ may be off by the sampling interval, by rounding, and by a fifth: neighbouring stages differ
    by a factor of at least 1.5, and noise that is added twice is larger by a factor of 1.4.
    """
    sigma = order.sigma if order else 0.0
    _check_reading(evidence, sigma, clean_digest, order)
    if order:
        _check_order(evidence["order"], order)
    elif evidence.get("step") is not None or evidence.get("order") is not None:
        raise EvidenceError(
            "clean weights were expected, but the worker reports a noise order: the evidence may be old"
        )
    if order and sigma:
        _check_groups(evidence, order)
    _check_sums(evidence, sigma)
    _check_measured(evidence, sigma)
    if order and sigma and "norm" in order.targets and evidence["weights_digest"] == clean_digest:
        raise EvidenceError(f"noise of σ {sigma:g} was ordered, but the norms are still clean; restart the rollout")


def _check_groups(evidence: Mapping[str, Any], order: NoiseSpec) -> None:
    """Raise unless every module with noise should have it, with its multiplier, and σ is right in each group."""
    for group in evidence["groups"]:
        for name in group["modules"]:
            if name in evidence["router_norms"] and not order.router_norms:
                raise EvidenceError(
                    f"{name} is the norm of a router and has noise, which the order does not allow: the noise would "
                    "change the routing"
                )
            if not order.selects(name):
                raise EvidenceError(f"{name} has noise, but the order's include and exclude do not select it")
            wanted = order.layers.multiplier_of(name, evidence["layers"], order.share)
            if not math.isclose(group["multiplier"], wanted, rel_tol=1e-9):
                raise EvidenceError(
                    f"{name} should have σ times {wanted:g}, but the worker gave it σ times {group['multiplier']:g}: "
                    "the multipliers did not reach the worker"
                )
        _check_group(group, order.sigma)


OLD_FIELDS = ("sigma_target", "sigma_measured", "modules", "changed_outside", "clean_digest", "weights_digest")


def check_old_reading(evidence: Mapping[str, Any], sigma: float, clean_digest: str | None) -> None:
    """Raise EvidenceError if a record of an older version shows noise that is not of `sigma`.

    The oldest records have neither groups nor an order, and any field may be missing. The fields that are present must
    be right. `clean_digest` is None if it is not recorded.
    """
    told = {key: value for key in (*OLD_FIELDS, "sigma_interval") if (value := evidence.get(key)) is not None}
    rounding = evidence.get("sigma_rounding") or 0.0
    if told.get("sigma_target", sigma) != sigma:
        raise EvidenceError(
            f"expected σ {sigma:g} from the schedule, but the worker's target is σ {told['sigma_target']:g}"
        )
    if told.get("changed_outside"):
        raise EvidenceError(f"{told['changed_outside']} weights changed that should be clean at σ {sigma:g}")
    if sigma and told.get("modules") == 0:
        raise EvidenceError("noise matched 0 modules: the rollout ran without noise")
    for key in ("clean_digest", *(() if sigma else ("weights_digest",))):
        if clean_digest and told.get(key, clean_digest) != clean_digest:
            raise EvidenceError(f"{key} is not that of the clean norms at the start of the run")
    low, high = told.get("sigma_interval") or ((0.0, 0.0) if sigma == 0 else (sigma, sigma))
    measured = told.get("sigma_measured", low)
    if not low <= sigma <= high:
        raise EvidenceError(f"σ {sigma:g} was ordered, but its interval is recorded as {low:.3g} to {high:.3g}")
    if not low / TOLERANCE - rounding <= measured <= high * TOLERANCE + rounding:
        raise EvidenceError(f"σ {sigma:g} was ordered, but σ {measured:.3g} is in the weights")


def _check_reading(
    evidence: Mapping[str, Any], sigma: float, clean_digest: str, order: NoiseSpec | None = None
) -> None:
    """Raise unless a reading shows noise of `sigma` and nothing else."""
    target = evidence["sigma_target"]
    if (evidence["modules"] == 0 or evidence["elements"] == 0) and (sigma or (order and order.targets)):
        raise EvidenceError("noise matched 0 modules: the rollout runs without noise; check the model class")
    if evidence["clean_digest"] != clean_digest:
        raise EvidenceError(
            "the clean norm weights are not those from the start of the run: something rewrote them, or read them "
            "while noise was on; restart the run"
        )
    if target != sigma:
        raise EvidenceError(
            f"expected noise of σ {sigma:g}, but the worker's target is σ {target:g}: it may have an old noise spec"
        )
    if order and (evidence["step"], evidence["unit"]) != (order.step, order.unit):
        raise EvidenceError(
            f"noise was ordered for step {order.step} in unit {order.unit}, but the worker reports step "
            f"{evidence['step']} in unit {evidence['unit']}: the step does not reach the rollout"
        )
    if evidence["changed_outside"]:
        raise EvidenceError(
            f"{evidence['changed_outside']} weights that should be clean are not clean at σ {sigma:g}: noise of an "
            "earlier step was not removed, or noise was written to the wrong weights; restart the rollout"
        )
    if sigma == 0 and evidence["weights_digest"] != clean_digest:
        raise EvidenceError("σ is 0, but the norms are not bit for bit clean; restart the rollout")


def _check_measured(evidence: Mapping[str, Any], sigma: float) -> None:
    """Raise unless the measured σ lies within the interval that sampling and rounding allow."""
    interval, measured, rounding = (evidence[f"sigma_{key}"] for key in ("interval", "measured", "rounding"))
    if sigma == 0:
        if measured != 0 or list(interval) != [0.0, 0.0]:
            raise EvidenceError(f"σ is 0, but σ {measured:.3g} is in the weights; restart the rollout")
        return
    expected = sigma_interval(sigma, evidence["elements"])
    if not all(math.isclose(one, other, rel_tol=1e-6) for one, other in zip(interval, expected, strict=True)):
        raise EvidenceError(
            f"the interval of σ {sigma:g} over {evidence['elements']} elements is {expected[0]:.3g} to "
            f"{expected[1]:.3g}, but the worker reports {interval[0]:.3g} to {interval[1]:.3g}: it measured something "
            "else"
        )
    low, high = expected
    if not low / TOLERANCE - rounding <= measured <= high * TOLERANCE + rounding:
        raise EvidenceError(
            f"σ {sigma:g} was ordered, but σ {measured:.3g} is in the weights (expected {low:.3g} to {high:.3g}): "
            "noise is missing or was added more than once; restart the rollout"
        )


def _check_sums(evidence: Mapping[str, Any], sigma: float) -> None:
    """Raise if the figures of a reading contradict each other: a part is missing or belongs to another reading."""
    groups, elements = evidence["groups"], evidence["elements"]
    if sigma == 0:
        figures = {"sigma_measured": 0.0, "sigma_rounding": 0.0, "unchanged_share": 1.0}
        if groups:
            raise EvidenceError("σ is 0, but the worker measured noise in modules; restart the rollout")
    else:
        if not groups or not elements:
            raise EvidenceError(f"noise of σ {sigma:g} was ordered, but the worker measured no noise in any module")
        parts = [(group, group["elements"] / elements) for group in groups]
        figures = {
            "elements": sum(group["elements"] for group in groups),
            "modules": sum(len(group["modules"]) for group in groups),
            "unchanged_share": sum(share * group["unchanged_share"] for group, share in parts),
        } | {
            key: math.sqrt(sum(share * (group[key] / group["multiplier"]) ** 2 for group, share in parts))
            for key in ("sigma_measured", "sigma_rounding")
        }
    for key, value in figures.items():
        if not math.isclose(evidence[key], value, rel_tol=1e-6, abs_tol=1e-12):
            raise EvidenceError(
                f"the worker reports {key} {evidence[key]:g}, but its parts give {value:g}: the evidence is incomplete"
            )


def check_equal_noise(holders: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise EvidenceError unless all `holders`, evidence by name ("rollout 0", "actor 1"), have the same norms."""
    (first, evidence), *others = holders.items()
    for name, other in others:
        if other["weights_digest"] != evidence["weights_digest"]:
            raise EvidenceError(
                f"{first} and {name} hold different noise at step {evidence['step']}; see evidence.jsonl"
            )


def check_used(evidence: Mapping[str, Any], sigma: float) -> None:
    """Raise EvidenceError if an actor had noise of `sigma`, but none of its forwards (`uses` counts them) used it."""
    if sigma > 0 and not evidence["uses"] > 0:
        raise EvidenceError(f"noise of σ {sigma:g} was given to the actor, but its forward did not use it")
    if sigma == 0 and evidence["uses"] != 0:
        raise EvidenceError(f"σ is 0, but {evidence['uses']} forwards of the actor had noise")


def _check_order(actual: Mapping[str, Any], order: NoiseSpec) -> None:
    expected, received = (json.loads(json.dumps(one)) for one in (order.to_dict(), dict(actual)))  # lists for tuples
    for key in expected.keys() | received.keys():
        if received.get(key) != expected.get(key):
            raise EvidenceError(
                f"the noise order has {key} = {expected.get(key)}, but the worker received {received.get(key)}: the "
                "value was lost on its way"
            )


def _check_group(group: Mapping[str, Any], sigma: float) -> None:
    sigma = sigma * group["multiplier"]
    what = f"{len(group['modules'])} {group['kind']} weights" + (
        f" with multiplier {group['multiplier']:g}" if group["multiplier"] != 1 else ""
    )
    unchanged, rounding = group["unchanged_share"], group["sigma_rounding"]
    # A draw is lost if it is below half a spacing. The probability is at most spacing · φ(0) / σ = 1.4 · rounding / σ.
    lost = min(1.0, 1.4 * rounding / sigma)
    if unchanged > 0.5 and lost > 0.1:
        raise EvidenceError(
            f"{unchanged:.0%} of the {what} did not change at σ {sigma:g}: their dtype cannot hold this noise; "
            "keep the norms in float32"
        )
    if group["silent"] and lost < 0.5:
        raise EvidenceError(
            f"{group['silent'][0]} did not change at all at σ {sigma:g}: the noise was not written to all of the "
            f"modules ({len(group['silent'])} of {what} are still clean); restart the rollout"
        )
    if unchanged > lost + 4 * math.sqrt(lost / group["elements"]) + 0.005:
        raise EvidenceError(
            f"{unchanged:.1%} of the {what} are still clean at σ {sigma:g}: the noise was not written to all of "
            "them; restart the rollout"
        )
    measured, (low, high) = group["sigma_measured"], sigma_interval(sigma, group["elements"])
    if not low / TOLERANCE - rounding <= measured <= high * TOLERANCE + rounding:
        raise EvidenceError(
            f"σ {sigma:g} was ordered for {what}, but σ {measured:.3g} is in the weights (expected {low:.3g} to "
            f"{high:.3g}): noise is missing or was added more than once; restart the rollout"
        )


def check_norms(expected: Collection[str], ranks: Collection[Mapping[str, Any]], order: NoiseSpec) -> None:
    """Raise EvidenceError unless every rank of the rollout has exactly the `expected` norms that `order` selects.

    `ranks`: the result of `NoiseInjector.describe` on each rank.
    """
    if "norm" not in order.targets:
        return
    wanted = {name for name in expected if order.selects(name)}
    for rank, answer in enumerate(ranks):
        actual = {name for name in answer["names"] if order.selects(name)}
        for names, fault in (
            (wanted - actual, "the model folder has it, but rollout rank {} does not: vLLM fuses it or leaves it out"),
            (actual - wanted, "rollout rank {} has it, but the model folder does not: vLLM adds or renames it"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise EvidenceError(
                    f"norm {min(names)}{more}: {fault.format(rank)} ({len(actual)} found, {len(wanted)} expected): "
                    "exclude it in aqn.noise.exclude, or remove `norm` from aqn.noise.targets"
                )
