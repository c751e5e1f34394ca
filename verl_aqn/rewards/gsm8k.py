"""The public name of the reward for GSM8K: `verl_aqn.rewards.gsm8k.score`."""

from verl_aqn.tasks.gsm8k import compute_score, score

__all__ = ["compute_score", "score"]
