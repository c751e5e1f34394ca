"""Uses of a probe: compare several σ, detect a σ that is too strong, find σ by its KL, and measure a run's start."""

import ctypes
import gc
import math
from collections.abc import Sequence

from omegaconf import DictConfig

from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import StrengthError
from verl_aqn.preflight.probe.measure import PROMPTS, Probe, Progress, Strength
from verl_aqn.preflight.settings import uses_critic

FACTORS = (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0)  # default σ of a probe, as factors of σ_start
FIT_TOKENS = 64  # tokens per response in the search for a KL
# Numbers of groups at a run's start, each with `rollout.n` complete responses. If none of 32 groups has reward
# variance, less than 8.9 % of all groups have it (95 %, one-sided: 0.911^32 = 0.05). `algorithm.filter_groups` stops a
# run at 1 in 11 groups, which is more.
START_GROUPS, SURE_GROUPS = 8, 32
# Smallest number of clean groups with reward variance that exact McNemar distinguishes from 0 (p = 2 · 2⁻⁶ = 0.03).
CLEAR_GROUPS = 6
_DESCENTS = 6  # steps by a factor of four, in the search for a σ with reward variance


def survey(probe: Probe, sigmas: Sequence[float]) -> list[Strength]:
    """Measure the clean policy, then each of `sigmas` in rising order."""
    return [probe.measure(sigma) for sigma in sorted({0.0, *sigmas})]


def check_strength(probe: Probe, rows: list[Strength], sigma: float, halvings: int = 3) -> None:
    """Check that with noise of `sigma` some groups have reward variance, if the clean policy has such groups.

    Nothing is checked if rewards were not measured, because the responses need tools.

    Raises:
        StrengthError: no group has reward variance. The message gives the largest smaller σ with which some group has:
            the largest of `rows`, or the first one found by decreasing σ, refined `halvings` times in log σ.
    """
    by_sigma = {row.sigma: row for row in rows}
    clean, accuracy = by_sigma[0.0].accuracy, by_sigma[sigma].accuracy
    if clean is None or accuracy is None:
        return
    if not _teaches(by_sigma[0.0]) or _teaches(by_sigma[sigma]) or accuracy[0] > clean[0]:
        return
    good = max(s for s, row in by_sigma.items() if s < sigma and _teaches(row))
    bad = min(s for s in by_sigma if s > good and s > 0)
    descents = 0
    while good == 0 and descents < _DESCENTS:
        lower, descents = float(f"{bad / 4:.2e}"), descents + 1
        good, bad = (lower, bad) if _teaches(probe.measure(lower)) else (0.0, lower)
    for _ in range(halvings if good else 0):
        middle = float(f"{math.sqrt(good * bad):.2e}")
        good, bad = (middle, bad) if _teaches(probe.measure(middle)) else (good, middle)
    largest = f"the largest σ with reward variance is about {good:g}" if good else f"σ {bad:g} has none either"
    raise StrengthError(
        f"aqn.noise.sigma_start={sigma:g} ({probe.order.unit}) leaves nothing to learn from: accuracy "
        f"{100 * accuracy[0]:.1f} %, no group of {probe.samples} responses to {len(probe.prompts)} prompts has reward "
        f"variance; {largest}"
    )


def fit_sigma(config: DictConfig, steps: int) -> Strength:
    """Set σ_start in `config` by `aqn.noise.target_kl`, scale σ_end alike, and return the measurement at σ_start."""
    noise = parse_aqn(config).noise
    assert noise.target_kl is not None
    found = Probe(config, steps, PROMPTS, 1, FIT_TOKENS).sigma_for(noise.target_kl)
    _release_memory()
    config.aqn.noise.sigma_start = found.sigma
    config.aqn.noise.sigma_end = float(f"{noise.sigma_end * (found.sigma / noise.sigma_start):.6g}")
    return found


def measure_start(config: DictConfig, steps: int, progress: Progress | None = None) -> list[Strength]:
    """Measure the policy on a few prompts before a run, without noise and at σ_start.

    A few groups may have no reward variance by chance, and stopping a good run costs more than starting a bad one. So
    if none of `START_GROUPS` groups has reward variance with noise, but some have without noise, `SURE_GROUPS` groups
    are measured. The noise is exactly that of the first noisy step, and the policy is the one before training.

    Raises:
        StrengthError: none of `SURE_GROUPS` groups has reward variance with noise, but `CLEAR_GROUPS` have it without
            noise. Not raised with a critic, which learns from rewards that differ between prompts.
        ConfigError, DataError, ModelError, EvidenceError: as `Probe`.
    """
    clean, noisy = _measured_start(config, steps, progress)
    _release_memory()
    return [clean, noisy]


def _measured_start(config: DictConfig, steps: int, progress: Progress | None) -> list[Strength]:
    samples = int(config.actor_rollout_ref.rollout.n)
    probe = Probe(config, steps, START_GROUPS, samples, progress=progress)
    rows = survey(probe, [probe.order.sigma])
    if uses_critic(config) or not _teaches(rows[0]) or _teaches(rows[1]):
        return rows
    del probe  # keep only one model in memory
    probe = Probe(config, steps, SURE_GROUPS, samples, progress=progress)
    rows = survey(probe, [probe.order.sigma])
    assert rows[0].variance is not None
    if round(rows[0].variance[0] * SURE_GROUPS) >= CLEAR_GROUPS:
        check_strength(probe, rows, probe.order.sigma, halvings=2)
    return rows


def _release_memory() -> None:
    """Return the memory of freed tensors to the system; glibc kept 0.7 GB of an embedded model for the whole run."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # a function of glibc
        trim(0)


def _teaches(row: Strength) -> bool:
    return row.variance is not None and row.variance[0] > 0
