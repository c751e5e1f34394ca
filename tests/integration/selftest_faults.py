"""`python -m tests.integration.selftest_faults FOLDER [pair]`: rungs of an engine with their subject broken.

With `pair`, the rung of two ranks, unbroken, on a CPU.

The output is one JSON line: {fault: {"status", "why"}}. "nothing" and "nothing again" are the rungs without a fault.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from verl_aqn.selftest import engine_rungs as rungs
from verl_aqn.selftest.child import answer
from verl_aqn.selftest.rung import Context


@contextmanager
def changed(context: Context, find: Callable, by: float = 1.0) -> Iterator[None]:
    """Add `by` to the first value of a weight of the engine's model, and put the old value back."""
    kept = []

    def change(worker) -> None:
        value = find(worker.model_runner.get_model()).data.view(-1)[:1]
        kept.append((value, value.clone()))
        value.add_(by if value.is_floating_point() else int(by))  # the codes of a packed layer are bytes

    rungs.engine_of(context).llm.collective_rpc(change)
    yield
    for value, old in kept:
        value.copy_(old)


@contextmanager
def adapter_scaled(context: Context, factor: float) -> Iterator[None]:
    """Multiply with the adapter's product by `factor`, while the buffers are right."""
    from verl_aqn.integrations.vllm.cpu_lora import SingleAdapterPunicaWrapper as Wrapper

    parts, whole = Wrapper.add_lora_linear, Wrapper.adapter_of_all

    def wrong_parts(self, y, x, a, b, scale, slices, **more):
        return parts(self, y, x, a, b, scale * factor, slices, **more)

    def wrong_whole(self, tokens, some_a, some_b):
        found = whole(self, tokens, some_a, some_b)
        return None if found is None else (found[0], found[1] * factor)

    with patch.object(Wrapper, "add_lora_linear", wrong_parts), patch.object(Wrapper, "adapter_of_all", wrong_whole):
        yield


@contextmanager
def adapter_lost(context: Context) -> Iterator[None]:
    """Keep the first adapter whatever is sent."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin as Runner

    with (
        patch.object(Runner, "add_lora", lambda self, request: True),
        patch.object(Runner, "remove_lora", lambda self, number: True),
    ):
        yield


@contextmanager
def deaf(context: Context, which: str) -> Iterator[None]:
    """Let the norms named `which` compute with their weights of now, like a graph that was captured before."""
    from verl_aqn.noise import find_norms

    engine = rungs.engine_of(context)
    undo = []

    def deafen(worker) -> None:
        for name, norm in find_norms(worker.model_runner.get_model()).items():
            if which not in name:
                continue
            kept, forward = norm.weight.data.clone(), norm.forward

            def wrong(*arguments, norm=norm, kept=kept, forward=forward, **named):
                held, norm.weight.data = norm.weight.data, kept
                try:
                    return forward(*arguments, **named)
                finally:
                    norm.weight.data = held

            norm.forward = wrong
            undo.append((norm, forward))

    engine.llm.collective_rpc(deafen)
    assert undo
    yield
    for norm, forward in undo:
        norm.forward = forward


def injector(name: str, wrong: Callable):
    from verl_aqn.noise import NoiseInjector

    return patch.object(NoiseInjector, name, wrong)


@contextmanager
def engine_s_injector(context: Context, name: str, wrong: Callable) -> Iterator[None]:
    """Break a method of the engine's injector, and not of the reference's."""
    held = []

    def break_it(worker) -> None:
        one = worker.model_runner.get_model().aqn_injector
        setattr(one, name, wrong)
        held.append(one)

    rungs.engine_of(context).llm.collective_rpc(break_it)
    yield
    for one in held:
        delattr(one, name)


def norm(model):
    return model.model.layers[0].input_layernorm.weight


def kernel(model):
    layer = model.model.layers[1].mlp.down_proj
    return getattr(layer, "base_layer", layer).weight


FAULTS: dict[str, tuple[str, Callable[[Context], object]]] = {
    "a norm of the base changed": ("base", lambda c: changed(c, norm)),
    "a weight of the kernel changed": ("base", lambda c: changed(c, kernel)),
    "an embedding changed": ("base", lambda c: changed(c, lambda m: m.model.embed_tokens.weight)),
    "an adapter that is a quarter too strong": ("lora", lambda c: adapter_scaled(c, 1.25)),
    "an adapter that is not used": ("lora", lambda c: adapter_scaled(c, 0.0)),
    "an adapter that is not replaced": ("sync", adapter_lost),
    "noise that is not written": ("noise", lambda c: engine_s_injector(c, "_write", lambda order, chosen: None)),
    "noise that no norm uses": ("noise", lambda c: deaf(c, "")),
    "noise that one norm does not use": ("noise", lambda c: deaf(c, "layers.1.post_attention")),
    "noise that stays": ("noise", lambda c: engine_s_injector(c, "_clean_all", lambda but: None)),
}


def main(folder: str, what: str = "faults") -> dict:
    context = Context("cpu", 1, Path(folder) / "work" / "engine")
    context.folder.mkdir(parents=True)
    if what == "pair":
        return {"two ranks": answer("engine_rungs.two_ranks", context)}
    names = ("base", "lora", "noise", "sync")
    found = {"nothing": {name: answer(f"engine_rungs.{name}", context) for name in names}}
    for fault, (name, broken) in FAULTS.items():
        with broken(context):
            found[fault] = answer(f"engine_rungs.{name}", context)
        rungs.engine_of(context).call("aqn_restore")
    found["nothing again"] = {name: answer(f"engine_rungs.{name}", context) for name in names}
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(*sys.argv[1:])), flush=True)
