"""Rungs of the rollout's speed: tokens per second of the packed base and of the same base in bf16."""

from typing import Any

from verl_aqn.checkpoints.loading import open_packed, packed_modules
from verl_aqn.integrations.verl.engine_probe import EngineProbe
from verl_aqn.selftest.rung import Broken, Context, NotApplicable, Reading
from verl_aqn.selftest.setting_up import Served, serve, start

BATCHES = {"cpu": (1, 8, 32), "cuda": (1, 32, 256), "npu": (1, 32, 256)}
TOKENS = {"cpu": 16, "cuda": 64, "npu": 64}
PROMPT = 32
ROUNDS = 3
"""The fastest counts, because other work on the machine only makes it slower."""
LARGE: dict[str, dict[str, int]] = {
    kind: {"hidden": 2048, "inner": 8192, "layers": 4, "heads": 16} for kind in ("cuda", "npu")
}
"""Sizes on accelerators: large enough that reading the weights takes most of the time of a token."""


def packed(context: Context) -> Reading:
    """Measure the packed base."""
    served = serve(context, LARGE.get(context.device))
    if served.form != "packed":
        raise NotApplicable("this device serves the packed base in bf16, so there is no packed rollout to measure")
    engine, answer = _engine(context, served)
    if answer["form"] != "packed" or "Emulation" in answer["kernel"]:
        raise Broken(f"the engine computes with {answer['kernel']} in form {answer['form']}, not with a packed kernel")
    return _measured(context, engine, answer)


def bf16(context: Context) -> Reading:
    """Measure the same values in bf16, and compare with the packed base."""
    engine, answer = _engine(context, serve(context, LARGE.get(context.device), form="bf16"))
    if answer["form"] != "bf16":
        raise Broken(f"the engine holds the base as {answer['form']} instead of bf16")
    reading = _measured(context, engine, answer)
    before = context.done["speed-packed"]["tokens_per_second"]
    now = reading.figures["tokens_per_second"]
    ratios = {batch: before[batch] / now[batch] for batch in now}
    shares = ", ".join(f"{ratio:.2f} (batch {batch})" for batch, ratio in ratios.items())
    return Reading(f"{reading.figure}; packed is {shares} of it", reading.figures | {"packed_of_bf16": ratios})


def _engine(context: Context, served: Served) -> tuple[EngineProbe, dict[str, Any]]:
    engine = start(context, served)
    return engine, engine.call("aqn_base", packed_modules(open_packed(served.packed)))[0]


def _measured(context: Context, engine: EngineProbe, answer: dict[str, Any]) -> Reading:
    tokens = TOKENS[context.device]
    found = {}
    for batch in BATCHES[context.device]:
        engine.tokens_per_second(batch, PROMPT, 4)  # warms up: caches, compiled code
        found[str(batch)] = max(engine.tokens_per_second(batch, PROMPT, tokens) for _ in range(ROUNDS))
    figure = ", ".join(f"{rate:,.0f} tokens/s at batch {batch}" for batch, rate in found.items())
    kernel = answer["kernel"]
    return Reading(f"{figure} ({kernel})", {"tokens_per_second": found, "kernel": kernel, **engine.compiled()})
