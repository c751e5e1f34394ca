"""Check that a run measures what `aqn.noise.control` follows."""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.schema import parse_aqn
from verl_aqn.preflight.findings import Finding


def check_control(config: DictConfig) -> Iterator[Finding]:
    """Check that every step can measure the target of σ; yield nothing if the schedule alone decides σ."""
    rule = parse_aqn(config).noise.controller
    if rule is None:
        return
    block, rollout = "actor_rollout_ref.rollout", config.actor_rollout_ref.rollout
    fix = ""
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):
        fix = "algorithm.rollout_correction.bypass_mode=true leaves out its figures: set it to false"
    elif not rollout.calculate_log_probs:
        fix = f"{block}.calculate_log_probs=false leaves out its figures: set it to true"
    elif rule.target == "kl" and not (rollout.temperature == 1 and rollout.top_p == 1 and rollout.top_k <= 0):
        fix = (
            f"{block} has temperature {rollout.temperature:g}, top_p {rollout.top_p:g} and top_k {rollout.top_k}, but "
            "vLLM scores a response again at 1, 1 and -1 alone: set these, or aqn.noise.control.target=entropy"
        )
    yield Finding("target of σ", f"{rule.target} of the rollout, from aqn.noise.control", fix)
