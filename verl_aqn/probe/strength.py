"""What is done with a probe: σ beside σ, a σ that is too strong, a σ by its KL, and a run's start."""

import math
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from verl_aqn.config import parse_aqn
from verl_aqn.errors import StrengthError
from verl_aqn.probe.measure import PROMPTS, Probe, Strength

FACTORS = (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0)  # of σ_start: the σ of a probe that is not told any
START_PROMPTS, START_TOKENS = 4, 64  # of the measurement at a run's start, and of the search for a KL


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

    The error names the largest smaller σ that leaves some: the largest of `rows`, refined `halvings` times in log σ.
    """
    by_sigma = {row.sigma: row for row in rows}
    clean, accuracy = by_sigma[0.0].accuracy, by_sigma[sigma].accuracy
    assert clean is not None
    assert accuracy is not None
    if not _teaches(by_sigma[0.0]) or _teaches(by_sigma[sigma]) or accuracy[0] > clean[0]:
        return
    good = max(s for s, row in by_sigma.items() if s < sigma and _teaches(row))
    bad = min(s for s in by_sigma if s > good and s > 0)
    for _ in range(halvings):
        middle = float(f"{math.sqrt(good * bad) if good else bad / 4:.2e}")
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
    found = Probe(config, steps, PROMPTS, 1, START_TOKENS).sigma_for(noise.target_kl)
    config.aqn.noise.sigma_start = found.sigma
    config.aqn.noise.sigma_end = float(f"{noise.sigma_end * (found.sigma / noise.sigma_start):.6g}")
    return found


def measure_start(config: DictConfig, steps: int) -> list[Strength]:
    """KL and entropy on a few prompts, clean and at σ_start: the seconds that every run can afford."""
    probe = Probe(config, steps, START_PROMPTS, 1, START_TOKENS)
    return [probe.measure(sigma, sampled=False) for sigma in (0.0, probe.order.sigma)]


def _teaches(row: Strength) -> bool:
    return row.variance is not None and row.variance[0] > 0
