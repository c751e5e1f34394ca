"""From the `aqn.noise` block of a config to a schedule and to the noise of one step."""

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.schema import NoiseConfig, parse_aqn
from verl_aqn.noise.control import ControlledSigma
from verl_aqn.noise.schedule import SigmaSchedule
from verl_aqn.noise.spec import NoiseSpec


def schedule_of(config: DictConfig | dict, total_steps: int) -> SigmaSchedule:
    """Return the schedule of σ over `total_steps` RL steps. If noise is disabled, σ is 0 at every step.

    With `aqn.noise.control` this is the start: a constant σ, and the steps without noise.
    """
    noise = parse_aqn(config).noise
    epochs = int(OmegaConf.select(OmegaConf.create(config), "trainer.total_epochs") or 1)
    return SigmaSchedule(
        sigma_start=noise.sigma_start if noise.enabled else 0.0,
        sigma_end=noise.sigma_end if noise.enabled else 0.0,
        num_stages=noise.num_stages,
        total_steps=total_steps,
        kind=noise.kind if noise.enabled else "constant",
        epoch_aware=noise.epoch_aware and noise.enabled,
        epochs=epochs,
        warmup=noise.warmup,
        off_from_step=noise.off_from_step if noise.enabled else None,
    )


def rule_of(noise: NoiseConfig, schedule: SigmaSchedule) -> SigmaSchedule | ControlledSigma:
    """Return what decides σ: the schedule, or with `aqn.noise.control` a new controller without measurements."""
    return ControlledSigma(noise.controller, schedule) if noise.controller else schedule


def order_of(noise: NoiseConfig, schedule: SigmaSchedule | ControlledSigma, step: int) -> NoiseSpec:
    """Return the complete noise specification of RL step `step` (from 0), so that no process needs its own config."""
    if not noise.enabled:
        return NoiseSpec(step, noise.seed, 0.0, noise.unit, targets=())
    return NoiseSpec(
        step=step,
        seed=noise.seed,
        sigma=schedule.sigma(step),
        unit=noise.unit,
        targets=noise.targets,
        include=noise.include,
        exclude=noise.exclude,
        router_norms=noise.router_norms,
        layers=noise.layers,
        share=step / schedule.total_steps,
    )
