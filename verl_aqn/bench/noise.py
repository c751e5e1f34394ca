"""How long noise takes: a draw for all norms at once, and writing, reading back and checking it."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import nn

from verl_aqn.noise import NoiseInjector, NoiseOrder, check_evidence
from verl_aqn.noise.gaussian import Span, draw_spans


def measure(norms: int = 57, width: int = 1536, rounds: int = 50) -> dict[str, float]:
    """Medians in seconds for `norms` RMSNorms of `width` (those of Qwen2.5-1.5B by default) on this machine's CPU.

    `draw`: N(0, 1) for all of them. `numpy`: numpy's own normal numbers, as many, from one generator without keys.
    `apply`: draw, write and read back with digests. `restore`: write clean and read back.
    """
    spans = [Span(f"model.layers.{i // 2}.norm_{i % 2}", 0, width) for i in range(norms)]
    injector = NoiseInjector(nn.ModuleDict({str(i): nn.RMSNorm(width, eps=1e-6) for i in range(norms)}))
    order = NoiseOrder(step=3, seed=0, sigma=0.05, unit="rms")
    check_evidence(injector.apply(order), order, injector.clean_digest)
    generator = np.random.default_rng(0)
    parts: dict[str, Callable[[], object]] = {
        "draw": lambda: draw_spans(0, 3, spans),
        "numpy": lambda: generator.standard_normal(norms * width, dtype=np.float32),
        "apply": lambda: injector.apply(order),
        "restore": injector.restore,
    }
    return {name: _seconds(part, rounds) for name, part in parts.items()}


def _seconds(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print({name: f"{seconds * 1e3:.2f} ms" for name, seconds in measure().items()})
