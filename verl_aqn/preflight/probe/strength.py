"""What is done with a probe: σ beside σ, a σ that is too strong, a σ by its KL, and a run's start."""

import ctypes
import gc
import math
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import StrengthError
from verl_aqn.preflight.probe.measure import PROMPTS, Probe, Strength

FACTORS = (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0)  # of σ_start: the σ of a probe that is not told any
FIT_TOKENS = 64  # of an answer, in the search for a KL
# Groups at a run's start, of `rollout.n` whole answers. None of 32 means that less than 8.9 % of groups have reward
# variance (95 %, one-sided: 0.911^32 = 0.05): fewer than the 1 in 11 at which `algorithm.filter_groups` ends a run.
START_GROUPS, SURE_GROUPS = 8, 32
CLEAR_GROUPS = 6  # of the clean policy: the least that exact McNemar tells from none (p = 2 · 2⁻⁶ = 0.03)
_DESCENTS = 6  # by a factor of four, where no σ that teaches is known


def survey(
    probe: Probe, sigmas: Sequence[float], progress: Callable[[int, int, str], None] | None = None
) -> list[Strength]:
    """The clean policy, then each of `sigmas` from small to large; `progress` gets (done, in all, which)."""
    rows: list[Strength] = []
    for sigma in (wanted := sorted({0.0, *sigmas})):
        if progress:
            progress(len(rows), len(wanted), f"σ {sigma:.3g}")
        rows.append(probe.measure(sigma))
    return rows


def check_strength(probe: Probe, rows: list[Strength], sigma: float, halvings: int = 3) -> None:
    """Raises StrengthError where `sigma` leaves no group with reward variance though the clean policy has some.

    Says nothing where rewards were not measured: the answers need tools.

    The error names the largest smaller σ that leaves some: the largest of `rows`, or the first found by going down, and
    then refined `halvings` times in log σ.
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
    largest = f"the largest σ that does is about {good:g}" if good else f"nor does σ {bad:g}"
    raise StrengthError(
        f"aqn.noise.sigma_start={sigma:g} ({probe.order.unit}) leaves nothing to learn from: accuracy "
        f"{100 * accuracy[0]:.1f} %, no group of {probe.samples} answers to {len(probe.prompts)} prompts has reward "
        f"variance; {largest}"
    )


def fit_sigma(config: DictConfig, steps: int) -> Strength:
    """Set σ_start by `aqn.noise.target_kl` and σ_end in the same ratio, in `config`; what was measured at σ_start."""
    noise = parse_aqn(config).noise
    assert noise.target_kl is not None
    found = Probe(config, steps, PROMPTS, 1, FIT_TOKENS).sigma_for(noise.target_kl)
    _release_memory()
    config.aqn.noise.sigma_start = found.sigma
    config.aqn.noise.sigma_end = float(f"{noise.sigma_end * (found.sigma / noise.sigma_start):.6g}")
    return found


def measure_start(config: DictConfig, steps: int) -> list[Strength]:
    """The policy on a few prompts before a run, clean and at σ_start.

    A few groups may be flat by chance, and stopping a good run costs more than letting a bad one show itself. So where
    none of `START_GROUPS` has reward variance under noise, though some of the clean ones do, `SURE_GROUPS` are taken.
    The noise is the very draw of the first noisy step, the policy the one before training.

    Raises:
        StrengthError: none of `SURE_GROUPS` has reward variance under noise, but `CLEAR_GROUPS` of the clean ones do.
            Not with a critic (GAE), which learns from rewards that differ between prompts.
        ConfigError, DataError, ModelError, EvidenceError: as `Probe`.
    """
    clean, noisy = _measured_start(config, steps)
    _release_memory()
    return [clean, noisy]


def _measured_start(config: DictConfig, steps: int) -> list[Strength]:
    samples = int(config.actor_rollout_ref.rollout.n)
    probe = Probe(config, steps, START_GROUPS, samples)
    rows = survey(probe, [probe.order.sigma])
    if config.algorithm.adv_estimator == "gae" or not _teaches(rows[0]) or _teaches(rows[1]):
        return rows
    del probe  # one model at a time
    probe = Probe(config, steps, SURE_GROUPS, samples)
    rows = survey(probe, [probe.order.sigma])
    assert rows[0].variance is not None
    if round(rows[0].variance[0] * SURE_GROUPS) >= CLEAR_GROUPS:
        check_strength(probe, rows, probe.order.sigma, halvings=2)
    return rows


def _release_memory() -> None:
    """Gives freed tensors back to the system: glibc kept 0.7 GB of an embedded model for the whole run."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def _teaches(row: Strength) -> bool:
    return row.variance is not None and row.variance[0] > 0
