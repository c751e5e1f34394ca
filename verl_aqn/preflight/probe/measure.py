"""The effect of σ on the policy before training: KL, entropy, accuracy and reward variance, on a few prompts.

The same σ can have no effect on one model and destroy another. So the effect is measured with the recipe's own base,
prompts, reward and temperature, and with the noise of the first step that has noise, written and read back by
`NoiseInjector`. KL and entropy are exact over the vocabulary, teacher-forced on one clean response per prompt. The
policy is the one before training: the base (a new adapter starts as zero), or the base with `lora_adapter_path`.

Everything runs in float32, including activations: norms in bfloat16 cannot hold small noise, and the layers of
transformers do not support float32 norms with 16-bit activations. The 16-bit arithmetic of the rollout is not part of
the measurement. All σ use the same prompts and the same uniform random numbers for sampling, so that differences
between them come from the noise.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from peft import PeftModel
from torch import Tensor

from verl_aqn.errors import ConfigError
from verl_aqn.models.generate import batches, generate, prefix, prefixes, shared_length
from verl_aqn.mxfp4.dense import dequantize_linears
from verl_aqn.noise import NoiseInjector, check_evidence
from verl_aqn.preflight.agent_tools import SINGLE, loops_of
from verl_aqn.preflight.policy import end_tokens, load_base, load_tokenizer
from verl_aqn.preflight.probe.probe_inputs import Prompt, first_noise, read_prompts
from verl_aqn.preflight.reward_function import reward_of
from verl_aqn.preflight.run_data import items_of
from verl_aqn.preflight.strength_figures import Strength
from verl_aqn.runs.accuracy import acc_in, reward_in
from verl_aqn.runs.stats.intervals import ratio_interval, wilson

Progress = Callable[[int, int, str], None]
PROMPTS, SAMPLES = 16, 4
TOLERANCE = 0.03  # relative tolerance of the search for a KL
_TOGETHER = 64  # sequences per batch


class Probe:
    """A probe with the base and prompts of a recipe, for any number of σ. Weights are clean outside of `measure`.

    `config` must be resolved (`prepare_model`, `prepare_data`); the run has `steps` RL steps. While
    responses are sampled, `progress` gets (tokens so far, the most that there can be, label).

    Raises:
        ConfigError: noise is disabled, σ is 0 at every step, or a sampling option is not supported.
        DataError: too few prompts of the data are short enough.
        ModelError, EvidenceError: as `load_model` and `NoiseInjector`.
    """

    def __init__(
        self,
        config: DictConfig,
        steps: int,
        prompts: int = PROMPTS,
        samples: int = SAMPLES,
        tokens: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.order = first_noise(config, steps)
        rollout = config.actor_rollout_ref.rollout
        if rollout.temperature <= 0 or rollout.get("top_p", 1) != 1 or rollout.get("top_k", -1) not in (-1, 0):
            key = "actor_rollout_ref.rollout"
            raise ConfigError(
                f"a probe samples from the whole vocabulary: set {key}.temperature above 0, {key}.top_p=1 and "
                f"{key}.top_k=-1, or turn the probe off (aqn.noise.probe=false, aqn.noise.target_kl=null)"
            )
        self.temperature = float(rollout.temperature)
        self.tokens = min(int(config.data.max_response_length), tokens or 10**9)
        self.tokenizer = load_tokenizer(config, Path(config.actor_rollout_ref.model.path))
        items = items_of(config, "train")
        self.prompts = read_prompts(config, self.tokenizer, prompts, items)
        self.whole = loops_of(config, items) == {SINGLE}
        """Whether a response is complete; with tools it is only the first turn, which the reward cannot score."""
        self.samples = samples if self.whole else 1
        self.progress = progress
        self.reward = reward_of(config)
        self.model = dequantize_linears(load_base(config, torch.float32))
        self.injector = NoiseInjector(self.model)  # before an adapter renames linear layers
        if adapter := config.actor_rollout_ref.model.lora_adapter_path:
            PeftModel.from_pretrained(self.model, adapter)  # inserts its layers into the model in place
        self.ends = end_tokens(self.model, self.tokenizer)
        self.answers: list[list[list[int]]] = self._sample("clean")  # responses of the clean policy, [prompt][sample]
        self.clean_states = self._states()

    def measure(self, sigma: float, sampled: bool = True) -> Strength:
        """Measure the policy with noise of `sigma` (0: without noise).

        Without `sampled` only KL and entropy are measured, which is much faster.
        """
        with self._noise(sigma):
            kl, entropy, dlogp, counts = self._compare()
            answers = (self.answers if sigma == 0 else self._sample(f"σ {sigma:g}")) if sampled and self.whole else None
        moved = float(dlogp.sum() / counts.sum())
        strength = Strength(sigma, ratio_interval(kl, counts), ratio_interval(entropy, counts), dlogp=moved)
        if answers is None:
            return strength
        told = [self._told(prompt, group) for prompt, group in zip(self.prompts, answers, strict=True)]
        right = sum(acc_in(one) for group in told for one in group)
        varied, groups = sum(len(set(map(reward_in, group))) > 1 for group in told), len(told)
        return replace(
            strength,
            accuracy=_share(right, groups * self.samples),
            variance=_share(varied, groups),
        )

    def sigma_for(self, target: float) -> Strength:
        """Find the σ (three digits) whose KL is within `TOLERANCE` of `target`, starting from the specification's σ.

        The search narrows a bracket on log σ by linear interpolation (KL grows about as σ²), or halves it if the
        interpolation stalls.

        Raises:
            ConfigError: no σ reaches the target, or no σ of three digits is near enough.
        """
        low = high = None
        sigma, tried = float(f"{self.order.sigma:.2e}"), 0
        for tried in range(40):
            found = self.measure(sigma, sampled=False)
            kl = found.kl[0]
            if abs(kl / target - 1) <= TOLERANCE:
                return found
            if kl < target:
                low = (math.log(sigma), math.log(max(kl, target * 1e-6) / target))
            else:
                high = (math.log(sigma), math.log(kl / target))
            if low and high:
                share = -low[1] / (high[1] - low[1])
                share = 0.5 if tried % 3 == 2 else min(max(share, 0.05), 0.95)
                guess = low[0] + share * (high[0] - low[0])
            else:
                # Extrapolate as if KL were c · σ², with a small margin; at most by a factor of ten.
                end = low or high
                assert end is not None
                guess = end[0] - min(max(end[1] / 2, -2.3), 2.3) + (0.1 if low else -0.1)
            before, sigma = sigma, float(f"{math.exp(guess):.2e}")
            if sigma == before or not 1e-9 < sigma < 1e6:
                break
        raise ConfigError(
            f"aqn.noise.target_kl={target:g} is not reached: KL is {kl:.3g} at σ {found.sigma:g} "
            f"({self.order.unit}): choose another target"
        )

    # ---- noise ----

    @contextmanager
    def _noise(self, sigma: float) -> Iterator[None]:
        """Write noise of `sigma`, read it back and check it; afterwards restore the clean weights, bit for bit."""
        order, clean = replace(self.order, sigma=sigma), self.injector.clean_digest
        try:
            check_evidence(self.injector.apply(order), order, clean)
            yield
        finally:
            check_evidence(self.injector.restore(), None, clean)

    # ---- running the model ----

    def _sample(self, label: str) -> list[list[list[int]]]:
        """Sample responses [prompt][sample], including the EOS token. `label` is for `progress`.

        The k-th token of a sample uses the same uniform random number for every σ and for any other samples.
        """
        uniforms = {(i, j): self._uniforms(i, j) for i in range(len(self.prompts)) for j in range(self.samples)}
        sampled = 0

        def choose(logits: Tensor, rows: list[tuple[int, int]], number: int) -> Tensor:
            nonlocal sampled
            sampled += len(rows)
            if self.progress:
                self.progress(sampled, len(uniforms) * self.tokens, label)
            chances = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
            draws = chances.new_tensor([[uniforms[row][number]] for row in rows])
            return torch.searchsorted(chances, draws * chances[:, -1:], right=True).clamp(max=chances.shape[1] - 1)

        ids = [prompt.ids for prompt in self.prompts]
        return generate(self.model, ids, choose, self.ends, self.tokens, self.samples, _TOGETHER)

    def _uniforms(self, prompt: int, sample: int) -> np.ndarray:
        return np.random.default_rng([self.order.seed, self.prompts[prompt].row, sample]).random(self.tokens)

    @torch.inference_mode()
    def _states(self) -> list[Tensor]:
        """Return the last hidden states before each token of each prompt's first clean response, [P] of [A, D].

        They are stored instead of the logits, which are many times larger; the output head has no noise.
        """
        states = [torch.empty(0)] * len(self.prompts)
        decoder = self.model.get_decoder()
        ids = [prompt.ids for prompt in self.prompts]
        longest = max(len(prompt) + len(group[0]) for prompt, group in zip(ids, self.answers, strict=True))
        shared = shared_length(ids) if prefixes(self.model, longest) else 0
        for batch in batches(ids, _TOGETHER):
            rows = [ids[i][shared:] + self.answers[i][0][:-1] for i in batch]
            longest = max(map(len, rows))
            # The padding is at the end of a row, where no token of a causal model attends to it.
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.device)
            cache = prefix(self.model, ids[0][:shared], len(batch))
            hidden = decoder(input_ids=padded, past_key_values=cache, use_cache=True).last_hidden_state
            for i, row, state in zip(batch, rows, hidden, strict=True):
                states[i] = state[len(row) - len(self.answers[i][0]) : len(row)].clone()
        return states

    @torch.inference_mode()
    def _compare(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return KL(clean || now), entropy now, |Δ log p| and the number of tokens, summed per prompt; float64 [P].

        The sums are over the tokens of the prompt's first clean response.
        """
        head = self.model.get_output_embeddings()
        kl, entropy, dlogp, counts = (np.zeros(len(self.prompts)) for _ in range(4))
        for i, (clean, now) in enumerate(zip(self.clean_states, self._states(), strict=True)):
            p, q = ((head(state).float() / self.temperature).log_softmax(-1) for state in (clean, now))
            kl[i] = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum().item()
            entropy[i] = -(q.exp() * q).sum(-1, dtype=torch.float64).sum().item()
            dlogp[i] = (p.exp() * (p - q).abs()).sum(-1, dtype=torch.float64).sum().item()
            counts[i] = len(now)
        return kl, entropy, dlogp, counts

    def _told(self, prompt: Prompt, group: list[list[int]]) -> list[Any]:
        """Return the result of the recipe's reward function for each response of `group`."""
        texts = self.tokenizer.batch_decode(group, skip_special_tokens=True)
        return [self.reward(solution_str=text, **prompt.reward) for text in texts]


def _share(part: int, whole: int) -> tuple[float, float, float]:
    return (part / whole, *wilson(part, whole))
