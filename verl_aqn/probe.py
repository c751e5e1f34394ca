"""What σ does to the policy before training: KL, entropy, accuracy and groups with reward variance, on a few prompts.

σ is not portable: the same number is nothing to one model and the end of another. So it is measured on the recipe's own
base, prompts, reward and temperature, with the noise of the first step that has any, written and read back by
`NoiseInjector`. KL and entropy are exact over the vocabulary, teacher forced on one clean answer a prompt.
The policy is the one before training (an adapter starts as zero).

Everything runs in float32, activations too: norms in bfloat16 cannot hold small noise, and HF's layers refuse float32
norms under 16-bit activations. The rollout's own 16-bit arithmetic is not part of what is measured. All σ see the same
prompts and the same uniform numbers for sampling, so differences between them are the noise's.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from verl_aqn.config import order_of, parse_aqn, schedule_of
from verl_aqn.errors import ConfigError, DataError, StrengthError
from verl_aqn.mxfp4.checkpoint import is_packed
from verl_aqn.mxfp4.experts import Mxfp4Experts
from verl_aqn.mxfp4.linear import Activation, Mxfp4Linear, prepare_input
from verl_aqn.mxfp4.model import load_model
from verl_aqn.noise import NoiseInjector, check_evidence
from verl_aqn.order import NoiseOrder
from verl_aqn.runs.stats import ratio_interval, wilson

PROMPTS, SAMPLES = 16, 4
FACTORS = (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0)  # of σ_start: the σ of a probe that is not told any
START_PROMPTS, START_TOKENS = 4, 64  # of the measurement at a run's start, and of the search for a KL
TOLERANCE = 0.03  # of the KL that is searched for
_TOGETHER = 64  # sequences that run together


@dataclass(frozen=True)
class Strength:
    """The policy under σ: value, low and high ends of 95 % intervals. Nats a token; shares as fractions of 1.

    KL(clean || noisy) and the noisy policy's entropy: bootstrap over prompts. Accuracy, and the share of groups whose
    rewards differ: Wilson's, as if samples of a prompt were independent. Those two are None where nothing was sampled.
    """

    sigma: float
    kl: tuple[float, float, float]
    entropy: tuple[float, float, float]
    accuracy: tuple[float, float, float] | None = None
    variance: tuple[float, float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Prompt(NamedTuple):
    """One row of the training data: its number, prompt tokens, and what the reward wants to know."""

    row: int
    ids: list[int]
    reward: dict[str, Any]


class Probe:
    """A recipe's base and prompts, held ready for any number of σ. The weights are clean outside of `measure`.

    `config` is resolved (`prepare_model`, `prepare_data`) and has `steps` RL steps.

    Raises:
        ConfigError: noise is disabled or σ is 0 at every step; a sampling option that is not taken into account.
        DataError: a data file without a prompt that is short enough.
        ModelError, EvidenceError: as `load_model` and `NoiseInjector`.
    """

    def __init__(
        self, config: DictConfig, steps: int, prompts: int = PROMPTS, samples: int = SAMPLES, tokens: int | None = None
    ) -> None:
        self.order = _first_noise(config, steps)
        rollout = config.actor_rollout_ref.rollout
        if rollout.temperature <= 0 or rollout.get("top_p", 1) != 1 or rollout.get("top_k", -1) not in (-1, 0):
            raise ConfigError(
                "a probe samples at a temperature above 0 from the whole vocabulary: set top_p=1, top_k=-1"
            )
        self.temperature, self.samples = float(rollout.temperature), samples
        self.tokens = min(int(config.data.max_response_length), tokens or 10**9)
        path = Path(config.actor_rollout_ref.model.path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.prompts = read_prompts(config, self.tokenizer, prompts)
        self.reward = reward_of(config)
        self.model = _load(config, path)
        self.injector = NoiseInjector(self.model)
        common = next(
            (i for i, c in enumerate(zip(*(p.ids for p in self.prompts), strict=False)) if len(set(c)) > 1), None
        )
        shortest = min(len(p.ids) for p in self.prompts)
        self.shared = min(shortest - 1, shortest if common is None else common)
        ends = self.model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.answers: list[list[list[int]]] = self._sample()  # of the clean policy, [prompt][sample]
        self.clean_states = self._states()

    def measure(self, sigma: float, sampled: bool = True) -> Strength:
        """The policy under noise of `sigma` (0: the clean one); without `sampled` only KL and entropy, much faster."""
        with self._noise(sigma):
            kl, entropy, counts = self._compare()
            answers = (self.answers if sigma == 0 else self._sample()) if sampled else None
        strength = Strength(sigma, ratio_interval(kl, counts), ratio_interval(entropy, counts))
        if answers is None:
            return strength
        rewards = [self._rewards(prompt, group) for prompt, group in zip(self.prompts, answers, strict=True)]
        right = sum(reward > 0 for group in rewards for reward in group)
        varied, groups = sum(len(set(group)) > 1 for group in rewards), len(rewards)
        return replace(
            strength,
            accuracy=_share(right, groups * self.samples),
            variance=_share(varied, groups),
        )

    def sigma_for(self, target: float) -> Strength:
        """The σ, of three digits, whose KL is within `TOLERANCE` of `target`; the order's σ is where the search begins.

        A bracket on log σ, narrowed by the line between its ends (KL grows about as σ²) or halved where that stalls.
        Raises ConfigError where no σ reaches the target, or none of three digits comes as near.
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
                # A first step as if KL were c · σ², a little beyond; no more than a factor of ten.
                end = low or high
                assert end is not None
                guess = end[0] - min(max(end[1] / 2, -2.3), 2.3) + (0.1 if low else -0.1)
            before, sigma = sigma, float(f"{math.exp(guess):.2e}")
            if sigma == before or not 1e-9 < sigma < 1e6:
                break
        raise ConfigError(
            f"aqn.noise.target_kl={target:g} is not reached: KL is {kl:.3g} at σ {found.sigma:g} "
            f"({self.order.unit}); choose another"
        )

    # ---- noise ----

    @contextmanager
    def _noise(self, sigma: float) -> Iterator[None]:
        """Noise of `sigma`, read back and checked; clean weights before and after, bit for bit."""
        order, clean = replace(self.order, sigma=sigma), self.injector.clean_digest
        try:
            check_evidence(self.injector.apply(order), order, clean)
            yield
        finally:
            check_evidence(self.injector.restore(), None, clean)

    # ---- running the model ----

    def _batches(self, together: int) -> Iterator[list[int]]:
        """Prompts by number, `together` of about one length at a time."""
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i].ids))
        for start in range(0, len(order), together):
            yield order[start : start + together]

    def _prefix(self, batch: int) -> DynamicCache:
        """The cache of what all prompts begin with: computed once."""
        cache = DynamicCache(config=self.model.config)
        if self.shared:
            self.model(
                input_ids=self._tensor([self.prompts[0].ids[: self.shared]]), past_key_values=cache, use_cache=True
            )
            cache.batch_repeat_interleave(batch)
        return cache

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)

    @torch.inference_mode()
    def _sample(self) -> list[list[list[int]]]:
        """Answers [prompt][sample], the end token included. The k-th token of a sample takes the same uniform number
        whatever σ is and whatever else is sampled."""
        answers: list[list[list[int]]] = [[[] for _ in range(self.samples)] for _ in self.prompts]
        for batch in self._batches(max(1, _TOGETHER // self.samples)):
            suffixes = [self.prompts[i].ids[self.shared :] for i in batch]
            longest = max(map(len, suffixes))
            pads = [longest - len(suffix) for suffix in suffixes]
            step = self._tensor([[0] * pad + suffix for pad, suffix in zip(pads, suffixes, strict=True)])
            # Padding stands between the shared beginning and the rest, and nothing looks at it.
            mask = self._tensor([[1] * self.shared + [0] * pad + [1] * (longest - pad) for pad in pads])
            left = self._tensor([[pad] for pad in pads])
            places = (self.shared + torch.arange(longest, device=left.device) - left).clamp(min=0)
            rows = [(i, j) for i in batch for j in range(self.samples)]  # those that go on
            cache = self._prefix(len(batch))
            draws = np.stack([self._uniforms(i, j) for i, j in rows])
            for number in range(self.tokens):
                logits = self.model(
                    input_ids=step, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]  # fmt: skip
                places = places[:, -1:] + 1
                if number == 0:  # a prompt is computed once for all of its samples
                    cache.batch_repeat_interleave(self.samples)
                    logits, mask, places = (x.repeat_interleave(self.samples, 0) for x in (logits, mask, places))
                chances = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
                draw = torch.from_numpy(draws[:, number : number + 1]).to(chances.device) * chances[:, -1:]
                step = torch.searchsorted(chances, draw, right=True).clamp(max=chances.shape[1] - 1)
                for (i, j), token in zip(rows, step[:, 0].tolist(), strict=True):
                    answers[i][j].append(token)
                on = [k for k, (i, j) in enumerate(rows) if answers[i][j][-1] not in self.ends]
                if not on:
                    break
                if len(on) < len(rows):
                    index = torch.tensor(on, device=step.device)
                    cache.batch_select_indices(index)
                    step, mask, places = step[index], mask[index], places[index]
                    rows, draws = [rows[k] for k in on], draws[on]
                mask = F.pad(mask, (0, 1), value=1)
        return answers

    def _uniforms(self, prompt: int, sample: int) -> np.ndarray:
        return np.random.default_rng([self.order.seed, self.prompts[prompt].row, sample]).random(self.tokens)

    @torch.inference_mode()
    def _states(self) -> list[Tensor]:
        """The last hidden state before each token of a prompt's first clean answer, [P] of [A, D]: they stand for the
        logits, many times larger (the output head takes no noise)."""
        states = [torch.empty(0)] * len(self.prompts)
        decoder = self.model.get_decoder()
        for batch in self._batches(_TOGETHER):
            rows = [self.prompts[i].ids[self.shared :] + self.answers[i][0][:-1] for i in batch]
            longest = max(map(len, rows))
            # Padding comes after a row, where a causal model does not look.
            ids = self._tensor([row + [0] * (longest - len(row)) for row in rows])
            hidden = decoder(input_ids=ids, past_key_values=self._prefix(len(batch)), use_cache=True).last_hidden_state
            for i, row, state in zip(batch, rows, hidden, strict=True):
                states[i] = state[len(row) - len(self.answers[i][0]) : len(row)].clone()
        return states

    @torch.inference_mode()
    def _compare(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By prompt, summed over its clean answer: KL(clean || now), entropy now, tokens; float64 [P]."""
        head = self.model.get_output_embeddings()
        kl, entropy, counts = (np.zeros(len(self.prompts)) for _ in range(3))
        for i, (clean, now) in enumerate(zip(self.clean_states, self._states(), strict=True)):
            p, q = ((head(state).float() / self.temperature).log_softmax(-1) for state in (clean, now))
            kl[i] = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum().item()
            entropy[i] = -(q.exp() * q).sum(-1, dtype=torch.float64).sum().item()
            counts[i] = len(now)
        return kl, entropy, counts

    def _rewards(self, prompt: Prompt, group: list[list[int]]) -> list[float]:
        texts = self.tokenizer.batch_decode(group, skip_special_tokens=True)
        found = [self.reward(solution_str=text, **prompt.reward) for text in texts]
        return [
            float(value["acc" if "acc" in value else "score"] if isinstance(value, dict) else value) for value in found
        ]


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


def read_prompts(config: DictConfig, tokenizer: Any, count: int) -> list[Prompt]:
    """`count` rows of the training data, chosen by a hash of their number: a larger count adds to a smaller one.

    Raises:
        DataError: fewer rows have a prompt within `data.max_prompt_length`.
    """
    files = config.data.train_files
    tables = [pq.read_table(Path(file).expanduser()) for file in ([files] if isinstance(files, str) else files)]
    total = sum(table.num_rows for table in tables)
    limit = config.data.train_max_samples
    seed = parse_aqn(config).noise.seed
    rows = sorted(
        range(min(total, limit) if limit > 0 else total),
        key=lambda row: hashlib.blake2b(f"{seed}\0{row}".encode(), digest_size=8).digest(),
    )
    options: Any = OmegaConf.to_container(config.data.get("apply_chat_template_kwargs") or OmegaConf.create({}))
    chosen: list[Prompt] = []
    for row in rows:
        at, table = row, tables[0]
        for table in tables:
            if at < table.num_rows:
                break
            at -= table.num_rows
        record = table.slice(at, 1).to_pylist()[0]
        text = tokenizer.apply_chat_template(
            record[config.data.prompt_key], tokenize=False, add_generation_prompt=True, **options
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= config.data.max_prompt_length:
            truth = record["reward_model"]["ground_truth"]
            told = {"data_source": record["data_source"], "ground_truth": truth, "extra_info": record["extra_info"]}
            chosen.append(Prompt(row, ids, told))
            if len(chosen) == count:
                return chosen
    raise DataError(f"{files} holds {len(chosen)} prompts within data.max_prompt_length, {count} are asked for")


def reward_of(config: DictConfig) -> Callable[..., Any]:
    """The recipe's reward function (`reward.custom_reward_function`), called with names as verl does.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    custom = config.reward.custom_reward_function
    path = str(custom.path or "")
    try:
        if path.startswith("pkg://"):
            module = importlib.import_module(path.removeprefix("pkg://"))
        else:
            spec = importlib.util.spec_from_file_location("verl_aqn_probe_reward", Path(path).expanduser())
            if spec is None or spec.loader is None:
                raise ImportError("no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return getattr(module, custom.name)
    except (ImportError, OSError, AttributeError) as error:
        raise ConfigError(f"reward.custom_reward_function {path!r} cannot be loaded: {error}") from error


class _Dense(nn.Linear):
    """An `Mxfp4Linear` dequantised once; its codes stay at hand for noise on linear layers."""

    weight_scale: nn.Parameter

    def __init__(self, layer: Mxfp4Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(layer.weight, requires_grad=False)
        self.bias = layer.bias
        self.activation = layer.activation
        self.register_buffer("mxfp4_packed", layer.weight_packed.data)
        self.weight_scale = layer.weight_scale
        self.mxfp4_digests: list[str] = []  # what a packed layer is known by
        self.logical_widths = [layer.out_features]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(prepare_input(x, self.activation), self.weight, self.bias)


def _load(config: DictConfig, path: Path) -> PreTrainedModel:
    """The recipe's base in float32, on the CPU or on the accelerator that its profile names."""
    aqn = parse_aqn(config)
    device = "cpu" if aqn.profile in ("cpu", "auto") else aqn.profile
    if not is_packed(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    model = load_model(path, torch.float32, device)
    for name, module in list(model.named_modules()):
        if isinstance(module, (Mxfp4Linear, Mxfp4Experts)):
            module.activation = Activation.parse(aqn.mxfp4.activation_arithmetic)
        if isinstance(module, Mxfp4Linear):
            model.set_submodule(name, _Dense(module))
    return model


def _first_noise(config: DictConfig, steps: int) -> NoiseOrder:
    """The order of the first RL step that has noise, at σ_start."""
    noise, schedule = parse_aqn(config).noise, schedule_of(config, steps)
    if not noise.enabled:
        raise ConfigError("aqn.noise.enabled=false: there is no noise to measure")
    for step in range(steps):
        if schedule.sigma(step) > 0:
            return replace(order_of(noise, schedule, step), sigma=noise.sigma_start)
    raise ConfigError(f"σ is 0 at each of the {steps} steps: there is no noise to measure; raise aqn.noise.sigma_start")


def _teaches(row: Strength) -> bool:
    return row.variance is not None and row.variance[0] > 0


def _share(part: int, whole: int) -> tuple[float, float, float]:
    return (part / whole, *wilson(part, whole))
