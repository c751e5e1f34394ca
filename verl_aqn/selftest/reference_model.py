"""What an engine should answer: log-probs of transformers and PEFT in float32 on the CPU, with adapter and noise."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.evaluation.export.trained_model import logprobs, with_adapter
from verl_aqn.integrations.verl.engine_probe import Answer
from verl_aqn.mxfp4.experts import packed_layers
from verl_aqn.mxfp4.linear import Activation
from verl_aqn.noise import NoiseInjector, NoiseSpec
from verl_aqn.selftest.rung import Broken
from verl_aqn.selftest.setting_up import ALPHA, RANK

ALLOWED = {"none": 0.1}
"""Largest allowed error of an effect by the rounding of activations, see `check_effect`."""
ALLOWED_W4A4 = 0.5
"""With 4-bit activations a difference in the last bit of bf16 may round to another 4-bit value."""
PROMPTS, PROMPT, RESPONSE = 4, 24, 16


def prompts() -> list[list[int]]:
    """Return prompts of random bytes."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (PROMPTS, PROMPT), generator=generator).tolist()


def adapted(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return (K, N) of every linear layer but the head, by name."""
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.endswith("lm_head")
    }


def random_adapter(layers: dict[str, tuple[int, int]], seed: int = 5) -> Adapter:
    """Return a random adapter on `layers`, strong enough to be seen in every log-prob."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int, std: float) -> torch.Tensor:
        return (std * torch.randn(rows, columns, generator=generator)).bfloat16()

    matrices = {name: (draw(RANK, k, 1 / math.sqrt(k)), draw(n, RANK, 0.08)) for name, (k, n) in layers.items()}
    return Adapter(matrices, RANK, ALPHA)


class Expected:
    """The model of a packed folder on the CPU, with an adapter that can be off and noise on its norms."""

    def __init__(self, packed: Path, activation: str) -> None:
        base = load_model(packed, torch.float32)
        for layer in packed_layers(base):
            layer.activation = Activation.parse(activation)
        self.activation = activation
        self.injector = NoiseInjector(base)
        self.layers = adapted(base)
        self.adapter = random_adapter(self.layers)
        exact = {name: (a.float(), b.float()) for name, (a, b) in self.adapter.matrices.items()}
        self.model = with_adapter(base, Adapter(exact, RANK, ALPHA))

    @torch.no_grad()
    def scores(self, answers: Sequence[Answer], *, adapter: bool, noise: NoiseSpec | None = None) -> list[list[float]]:
        """Return the log-probs of all tokens but the first, for each answer."""
        with self._noisy(noise):
            first, rest = [one.prompt[:1] for one in answers], [one.prompt[1:] + one.tokens for one in answers]
            if adapter:
                return logprobs(self.model, first, rest)
            with self.model.disable_adapter():
                return logprobs(self.model, first, rest)

    @contextmanager
    def _noisy(self, noise: NoiseSpec | None) -> Iterator[None]:
        if noise is not None:
            self.injector.apply(noise)
        try:
            yield
        finally:
            self.injector.restore()


def scores_of(answers: Sequence[Answer]) -> list[list[float]]:
    """Return the engine's log-probs in the form of `Expected.scores`."""
    return [one.of_prompt + one.of_tokens for one in answers]


def check_effect(
    answers: Sequence[Answer], right: list[list[float]], without: list[list[float]], activation: str, what: str
) -> dict[str, float]:
    """Compare an engine's log-probs with the right ones, in prefill and in decoding, and return the figures.

    error = ‖engine − right‖ / ‖right − without‖, where `without` are log-probs without the adapter or noise. It is 0
    for an engine that computes what it should, 1 for one that ignores the adapter or noise, and about 0.25 for a
    scaling that is wrong by a quarter.

    Raises:
        Broken: an error is larger than `ALLOWED`, or the effect is too small to be seen.
    """
    found: dict[str, float] = {}
    allowed = ALLOWED.get(activation, ALLOWED_W4A4)
    for part, cut in (("prefill", slice(0, PROMPT - 1)), ("decoding", slice(PROMPT - 1, None))):
        engine, wanted, plain = ([x for row in rows for x in row[cut]] for rows in (scores_of(answers), right, without))
        if not all(map(math.isfinite, engine)):
            raise Broken(f"{what}, {part}: the engine's log-probs are not finite")
        size, apart = _norm(wanted, plain), _norm(engine, wanted)
        if not size > 0:
            raise Broken(f"{what}, {part}: the reference shows no effect, so nothing can be compared")
        found[f"{part}_error"] = apart / size
        found[f"{part}_nats"] = sum(abs(a - b) for a, b in zip(engine, wanted, strict=True)) / len(engine)
        found[f"{part}_effect_nats"] = sum(abs(a - b) for a, b in zip(wanted, plain, strict=True)) / len(plain)
        if apart > allowed * size:
            raise Broken(
                f"{what}, {part}: log-probs are {found[f'{part}_nats']:.3f} nats a token from the reference; the "
                f"effect is {found[f'{part}_effect_nats']:.3f}, so the error is {apart / size:.2f} of it "
                f"(allowed {allowed:g})"
            )
    return found


def _norm(one: Iterable[float], other: Iterable[float]) -> float:
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(one, other, strict=True)))
