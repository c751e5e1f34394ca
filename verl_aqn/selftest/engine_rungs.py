"""Rungs of one engine: what it holds, and whether it uses it."""

import math
import statistics
from collections.abc import Callable
from typing import Any, TypeVar

from verl_aqn.checkpoints.actual_base import actual_base
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.errors import AqnError
from verl_aqn.integrations.verl.base_evidence import BaseRecords
from verl_aqn.integrations.verl.engine_probe import Answer, EngineProbe
from verl_aqn.noise import NoiseSpec, check_evidence
from verl_aqn.runs.judge.base_record import check_base, sentence
from verl_aqn.selftest import reference_model
from verl_aqn.selftest.rung import Broken, Context, Reading
from verl_aqn.selftest.setting_up import RANK, Served, serve, start

Thing = TypeVar("Thing")
SIGMA = 0.3
"""σ of the noise on one norm, in units of the norm's rms: strong, so that its effect is seen above bf16's rounding."""
SYNCS = 5
REPEATED = 1e-3
"""Nats per token between two answers of the same weights: 0 unless the device's sums depend on the moment."""


def once(context: Context, name: str, make: Callable[[], Thing]) -> Thing:
    """Return an object that the rungs of a session share; make it when it is first asked for."""
    if name not in context.shared:
        context.shared[name] = make()
    return context.shared[name]


def served_of(context: Context) -> Served:
    return once(context, "served", lambda: serve(context))


def reference_of(context: Context) -> reference_model.Expected:
    base = served_of(context)
    return once(context, "reference", lambda: reference_model.Expected(base.packed, base.activation))


def engine_of(context: Context) -> EngineProbe:
    """Return the session's engine. It is eager, so that these rungs say nothing about compilation and graphs."""
    return once(context, "engine", lambda: start(context, served_of(context), enforce_eager=True))


def base(context: Context) -> Reading:
    """Compare every tensor in the engine with the folder, and read the name of the kernel."""
    served = served_of(context)
    engine = engine_of(context)
    record, answer = read_base(engine, served)
    kernel = answer[0]["kernel"]
    if not kernel:
        raise Broken("the engine names no kernel for its packed layers")
    figures = {
        "kernel": kernel, "form": answer[0]["form"], "layers": answer[0]["layers"],
        "activations": answer[0]["activations"], "start_s": engine.start_s, **engine.compiled(),
    }  # fmt: skip
    return Reading(
        f"{sentence(record)}; kernel {kernel}, form {figures['form']}, {engine.start_s:.0f} s to load", figures
    )


def read_base(engine: EngineProbe, served: Served) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the record of the base and every rank's answer.

    Raises:
        Broken: a tensor differs from the folder or is missing.
    """
    told: Callable[[str], None] = lambda text: print(text, flush=True)  # noqa: E731
    records = BaseRecords(served.packed, served.form, served.activation, told)
    model = load_model(served.packed).requires_grad_(False)
    actor = actual_base(model, served.packed)._asdict() | {"activations": [served.activation]}
    answers = engine.call("aqn_base", records.packed)
    record = records.record("start", [actor], answers, {"actor": 1, "rollout": len(answers)})
    try:
        check_base(record, None)
    except AqnError as fault:
        raise Broken(str(fault)) from fault
    return record, answers


def send(context: Context, engine: EngineProbe, adapter: Any) -> float:
    """Send an adapter as the actor does, check what every rank holds then, and return the seconds of sending.

    Raises:
        Broken: a rank holds another adapter.
    """
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.matrices}),
    }  # fmt: skip
    seconds = engine.send(dict(adapter.served()), config)
    for rank, held in enumerate(engine.call("aqn_adapter")):
        if not held["slices"] and held["adapter_digest"] != adapter.digest():
            raise Broken(f"rank {rank} holds an adapter that differs from the one that was sent")
    return seconds


def _answers(engine: EngineProbe, *, adapter: bool) -> list[Answer]:
    return engine.answers(reference_model.prompts(), reference_model.RESPONSE, adapter=adapter)


def lora(context: Context) -> Reading:
    """Compare the engine's log-probs with an adapter with PEFT's."""
    engine, reference = engine_of(context), reference_of(context)
    send(context, engine, reference.adapter)
    figures = lora_figures(engine, reference)
    return Reading(
        f"{figures['prefill_nats']:.4f} (prefill) and {figures['decoding_nats']:.4f} nats a token (decoding) from "
        f"PEFT, {figures['prefill_error']:.3f} and {figures['decoding_error']:.3f} of the adapter's effect",
        figures,
    )


def lora_figures(engine: EngineProbe, reference: reference_model.Expected) -> dict[str, float]:
    """Return how far the engine's log-probs with the adapter are from PEFT's, see `reference_model.check_effect`."""
    answers = _answers(engine, adapter=True)
    right, without = (reference.scores(answers, adapter=on) for on in (True, False))
    return reference_model.check_effect(answers, right, without, reference.activation, "with the adapter")


def noise(context: Context) -> Reading:
    """Write noise to each norm alone, compare the engine's log-probs with the reference's, and take it away."""
    figures = noise_figures(engine_of(context), reference_of(context))
    return Reading(
        f"{figures['norms']} norms, one after another: the largest error is {figures['largest_error']:.3f} of the "
        "noise's effect; clean again bit for bit",
        figures,
    )


def noise_figures(engine: EngineProbe, reference: reference_model.Expected) -> dict[str, Any]:
    """Return the number of norms and the largest error, over all norms one after another and all of them together.

    Raises:
        Broken: noise is not written, is not used by a forward, or stays.
    """
    found = engine.call("aqn_prepare", order(0).to_dict())
    names = found[0]["names"]
    if sorted(names) != sorted(reference.injector.names):
        raise Broken(f"the engine has the norms {names}, the model has {reference.injector.names}")
    digest = found[0]["clean_digest"]
    clean = _answers(engine, adapter=False)
    worst, where = 0.0, ""
    for step, chosen in enumerate([(name,) for name in names] + [()]):
        spec = order(step, chosen)
        what = f"with noise on {chosen[0] if chosen else 'all norms'}"
        for evidence in engine.call("aqn_apply_noise", spec.to_dict()):
            _proved(evidence, spec, digest, what)
        answers = _answers(engine, adapter=False)
        right = reference.scores(answers, adapter=False, noise=spec)
        without = reference.scores(answers, adapter=False)
        errors = reference_model.check_effect(answers, right, without, reference.activation, what)
        largest = max(errors["prefill_error"], errors["decoding_error"])
        worst, where = max((worst, where), (largest, what))
    for evidence in engine.call("aqn_restore"):
        _proved(evidence, None, digest, "after the noise")
    if (apart := apart_of(clean, _answers(engine, adapter=False))) > REPEATED:
        raise Broken(f"after the noise was taken away log-probs are {apart:.3g} nats a token from those before it")
    return {"norms": len(names), "largest_error": worst, "where": where, "sigma": SIGMA}


def apart_of(before: list[Answer], after: list[Answer]) -> float:
    """Return the mean distance of log-probs in nats per token, infinity if tokens differ."""
    if [one.tokens for one in before] != [one.tokens for one in after]:
        return math.inf
    pairs = zip(reference_model.scores_of(before), reference_model.scores_of(after), strict=True)
    return statistics.mean(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def order(step: int, include: tuple[str, ...] = ()) -> NoiseSpec:
    """Return the noise of one trial."""
    return NoiseSpec(step=step, seed=0, sigma=SIGMA, unit="rms", include=include)


def _proved(evidence: dict[str, Any], spec: NoiseSpec | None, digest: str, what: str) -> None:
    try:
        check_evidence(evidence, spec, digest)
    except AqnError as fault:
        raise Broken(f"{what}: {fault}") from fault


def sync(context: Context) -> Reading:
    """Send adapters one after another, read each back, and measure the time."""
    engine, reference = engine_of(context), reference_of(context)
    seconds = []
    for number in range(SYNCS):
        other = reference_model.random_adapter(reference.layers, seed=10 + number)
        seconds.append(send(context, engine, other))
    sent = sum(tensor.nbytes for _, tensor in reference.adapter.served())
    figures = {"bytes": sent, "seconds": statistics.median(seconds), "slowest_s": max(seconds), "syncs": SYNCS}
    return Reading(
        f"{sent / 1e6:.2f} MB in {1e3 * figures['seconds']:.0f} ms (median of {SYNCS}), each read back equal", figures
    )


def sleep(context: Context) -> Reading:
    """Put the engine to sleep and wake it, and compare base, adapter, norms and log-probs with those before."""
    engine, reference, served = engine_of(context), reference_of(context), served_of(context)
    from verl_aqn.selftest.devices import runtime

    send(context, engine, reference.adapter)
    device = runtime(context.device)
    before, answers = _held(engine, served), _answers(engine, adapter=True)
    awake = device.mem_get_info()[0]
    engine.sleep()
    asleep = device.mem_get_info()[0]
    engine.wake()
    after = _held(engine, served)
    for what, value in before.items():
        if after[what] != value:
            raise Broken(f"{what} differ after sleep and wake")
    figures = {"freed_gb": (asleep - awake) / 1e9}
    if _answers(engine, adapter=True) != answers:
        figures |= lora_figures(engine, reference)  # other sums are allowed, other results are not
    if figures["freed_gb"] <= 0:
        raise Broken(f"sleep freed no memory ({figures['freed_gb']:.2f} GB)")
    return Reading(f"base, adapter and norms unchanged; sleep freed {figures['freed_gb']:.1f} GB", figures)


def _held(engine: EngineProbe, served: Served) -> dict[str, Any]:
    record, answers = read_base(engine, served)
    return {
        "the digests of the base": [record["holders"], [one["weights_digest"] for one in answers]],
        "the adapter's digests": [one["adapter_digest"] for one in engine.call("aqn_adapter")],
        "the norms' digests": [one["weights_digest"] for one in engine.call("aqn_restore")],
    }


def two_ranks(context: Context) -> Reading:
    """Start an engine on two devices, and check base, adapter and noise as with one."""
    served, reference = served_of(context), reference_of(context)
    engine = start(context, served, tensor_parallel_size=2, enforce_eager=True)
    record, answers = read_base(engine, served)
    if len(answers) != 2:
        raise Broken(f"{len(answers)} ranks answered instead of 2")
    send(context, engine, reference.adapter)
    figures = {**lora_figures(engine, reference), **noise_figures(engine, reference), "kernel": answers[0]["kernel"]}
    return Reading(
        f"{sentence(record)}; {figures['decoding_nats']:.4f} nats a token from PEFT; noise as on one rank "
        f"(error {figures['largest_error']:.3f})",
        figures,
    )
