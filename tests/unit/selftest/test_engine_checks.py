"""What decides in the rungs that need an engine, a graph or a run: with stand-ins, because no device is here.

tests/integration/test_selftest.py breaks a real engine on a CPU.
"""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from verl_aqn.integrations.verl.engine_probe import Answer
from verl_aqn.selftest import engine_rungs, graph_rungs, reference_model, run_rungs, speed_rungs
from verl_aqn.selftest.child import answer
from verl_aqn.selftest.reference_model import PROMPT, RESPONSE, check_effect
from verl_aqn.selftest.rung import FAILED, NOT_RUN, PASSED, Broken, Context

TOKENS = PROMPT - 1 + RESPONSE


def answers(values: list[float]) -> list[Answer]:
    return [Answer([0] * PROMPT, [0] * RESPONSE, values[: PROMPT - 1], values[PROMPT - 1 :])]


RIGHT = [-1.0 - 0.1 * number for number in range(TOKENS)]
WITHOUT = [value + (0.5 if number % 2 else -0.5) for number, value in enumerate(RIGHT)]


def test_an_engine_that_computes_what_it_should_is_near():
    near = [value + 0.01 for value in RIGHT]
    found = check_effect(answers(near), [RIGHT], [WITHOUT], "none", "adapter")
    assert found["prefill_error"] == pytest.approx(0.02)
    assert found["decoding_effect_nats"] == pytest.approx(0.5)


@pytest.mark.parametrize("part", ["prefill", "decoding"])
@pytest.mark.parametrize("share", [0.0, 0.75, 1.25, -1.0])
def test_an_effect_that_is_too_weak_or_too_strong_fails_in_each_part(part, share):
    wrong = [w + share * (r - w) for r, w in zip(RIGHT, WITHOUT, strict=True)]
    cut = slice(0, PROMPT - 1) if part == "prefill" else slice(PROMPT - 1, None)
    mixed = list(RIGHT)
    mixed[cut] = wrong[cut]
    with pytest.raises(Broken, match=part):
        check_effect(answers(mixed), [RIGHT], [WITHOUT], "none", "adapter")


def test_without_an_effect_nothing_passes():
    with pytest.raises(Broken, match="no effect"):
        check_effect(answers(RIGHT), [RIGHT], [RIGHT], "none", "adapter")


def test_log_probs_that_are_not_numbers_fail():
    with pytest.raises(Broken, match="not finite"):
        check_effect(answers([float("nan"), *RIGHT[1:]]), [RIGHT], [WITHOUT], "none", "adapter")


def test_answers_of_the_same_weights_are_near():
    before = answers(RIGHT)
    assert engine_rungs.apart_of(before, answers(RIGHT)) == 0
    assert engine_rungs.apart_of(before, answers([value + 0.5 for value in RIGHT])) == pytest.approx(0.5)
    other = [Answer(before[0].prompt, [1] * RESPONSE, before[0].of_prompt, before[0].of_tokens)]
    assert engine_rungs.apart_of(before, other) == float("inf")


class Compiled:
    """An engine that captured graphs, or not."""

    start_s = 1.0

    def __init__(self, captured: int) -> None:
        self.captured = captured

    def compiled(self) -> dict[str, Any]:
        return GRAPHS | {"captured": self.captured}


@pytest.mark.parametrize("captured", [12, 0])
@pytest.mark.parametrize("fault", ["", "noise on a norm is not used"])
def test_the_rung_of_graphs_needs_graphs_and_noise_in_them(monkeypatch, tmp_path, captured, fault):
    def use(*_: Any) -> dict[str, Any]:
        if fault:
            raise Broken(fault)
        return {"norms": 5, "largest_error": 0.02, "decoding_nats": 0.01}

    started: dict[str, Any] = {}
    monkeypatch.setattr(graph_rungs, "use", use)
    monkeypatch.setattr(graph_rungs, "served_of", lambda context: None)
    monkeypatch.setattr(graph_rungs, "start", lambda *_, **options: started.update(options) or Compiled(captured))
    said = answer("graph_rungs.noise", Context("cuda", 1, tmp_path))
    assert said["status"] == (PASSED if captured and not fault else FAILED)
    assert started == {"enforce_eager": False}


GRAPHS = {"eager": False, "graphs": "FULL_AND_PIECEWISE", "captured": 12, "passes": ["fuse_norm_quant"]}


def test_an_engine_with_graphs():
    graph_rungs.check_graphs(GRAPHS)


@pytest.mark.parametrize("other", [{"eager": True}, {"graphs": "NONE"}, {"captured": 0}])
def test_an_engine_without_graphs_fails(other):
    with pytest.raises(Broken, match="no graphs"):
        graph_rungs.check_graphs(GRAPHS | other)


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ({"fuse_norm_quant": {"largest_error": 0.02}}, PASSED),
        ({"fuse_norm_quant": {"fault": "noise is not used"}}, FAILED),
        ({"fuse_norm_quant": {"largest_error": 0.02}, "enable_sp": {"fault": "turned off"}}, FAILED),
        ({}, NOT_RUN),
    ],
)
def test_each_fusion_pass_must_leave_the_noise(monkeypatch, tmp_path, results, status):
    monkeypatch.setattr(graph_rungs, "_trial", lambda context, name: results[name])
    context = Context("cuda", 1, tmp_path, done={"graph-noise": {"passes": ["eliminate_noops", *results]}})
    assert answer("graph_rungs.fusions", context)["status"] == status


def test_a_trial_turns_the_other_passes_off(monkeypatch, tmp_path):
    from omegaconf import OmegaConf

    run = {"compilation_config": {"pass_config": {"fuse_norm_quant": False, "fuse_act_quant": True}, "mode": 3}}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"engine_kwargs": {"vllm": run}}}})
    monkeypatch.setattr(graph_rungs, "served_of", lambda context: SimpleNamespace(config=config))
    context = Context("cuda", 1, tmp_path, done={"passes": dict.fromkeys(["eliminate_noops", "fuse_act_quant", "x"])})
    found = graph_rungs.options(context, "x")["compilation_config"]
    assert found == {"mode": 3, "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False, "x": True}}


class Sleeper:
    """An engine that loses something when it sleeps."""

    def __init__(self, lost: str) -> None:
        self.lost, self.asleep, self.free, self.slept = lost, False, 100, False

    def sleep(self) -> None:
        self.asleep = self.slept = True
        self.free = 100 if self.lost == "memory" else 900

    def wake(self) -> None:
        self.asleep, self.free = False, 100

    def answers(self, *_: Any, **__: Any) -> list[int]:
        return [1 + (self.slept and self.lost == "log-probs")]


@pytest.mark.parametrize("lost", ["nothing", "the base", "the adapter", "the norms", "log-probs", "memory"])
def test_sleep_must_keep_everything(monkeypatch, tmp_path, lost):
    engine = Sleeper(lost)

    def held(*_: Any) -> dict[str, Any]:
        return {name: (name, engine.slept and name == lost) for name in ("the base", "the adapter", "the norms")}

    def wrong(*_: Any) -> dict[str, float]:
        raise Broken("log-probs are far from PEFT's")

    for name, value in {
        "engine_of": lambda c: engine, "served_of": lambda c: None, "send": lambda *_: 0.0, "_held": held,
        "reference_of": lambda c: SimpleNamespace(adapter=None), "lora_figures": wrong,
    }.items():  # fmt: skip
        monkeypatch.setattr(engine_rungs, name, value)
    device = SimpleNamespace(mem_get_info=lambda: (engine.free, 1000))
    monkeypatch.setattr("verl_aqn.selftest.devices.runtime", lambda kind: device)
    said = answer("engine_rungs.sleep", Context("cuda", 1, tmp_path))
    assert said["status"] == (PASSED if lost == "nothing" else FAILED), said


MEMORY = {side: {"bytes": 1000, "parts": {}} for side in ("actor", "rollout")}


def peaks(actor: int, rollout: int, kind: str = "device") -> dict[str, Any]:
    return {"actor": [{"resident": 5, kind: actor}], "rollout": [{"resident": 5, kind: rollout}]}


def test_a_peak_within_its_estimate():
    assert run_rungs.compared(peaks(1200, 800), MEMORY, "cuda").figures["actor"]["peak"] == 1200
    assert run_rungs.compared(peaks(1200, 9000), MEMORY, "cuda"), "vLLM's cache takes what it is given"


@pytest.mark.parametrize(
    ("found", "device"),
    [
        (peaks(1300, 800), "cuda"),
        (peaks(800, 1300, "resident"), "cpu"),
        (peaks(0, 800), "npu"),
        ({"actor": [{"resident": 5}], "rollout": [{"resident": 5}]}, "cuda"),
        ({"actor": [], "rollout": []}, "cuda"),
    ],
)
def test_a_peak_that_is_too_high_or_missing_fails(found, device):
    with pytest.raises(Broken):
        run_rungs.compared(found, MEMORY, device)


@pytest.mark.parametrize(
    ("which", "form", "kernel", "status"),
    [
        ("packed", "packed", "MarlinMxFp4LinearKernel", PASSED),
        ("packed", "packed", "EmulationMxfp4LinearKernel", FAILED),
        ("packed", "bf16", "UnquantizedLinearMethod", FAILED),
        ("bf16", "bf16", "UnquantizedLinearMethod", PASSED),
        ("bf16", "packed", "MarlinMxFp4LinearKernel", FAILED),
    ],
)
def test_speed_is_of_the_kernel_that_it_says(monkeypatch, tmp_path, which, form, kernel, status):
    engine = SimpleNamespace(tokens_per_second=lambda batch, prompt, tokens: 100.0 * batch, compiled=dict)
    monkeypatch.setattr(speed_rungs, "serve", lambda *_, **__: SimpleNamespace(form="packed"))
    monkeypatch.setattr(speed_rungs, "_engine", lambda *_: (engine, {"form": form, "kernel": kernel}))
    done = {"speed-packed": {"tokens_per_second": {"1": 50.0, "32": 6400.0, "256": 25600.0}}}
    said = answer(f"speed_rungs.{which}", Context("cuda", 1, tmp_path, done=done))
    assert said["status"] == status
    if status == PASSED and which == "bf16":
        assert said["figures"]["packed_of_bf16"] == {"1": 0.5, "32": 2.0, "256": 1.0}


def test_an_engine_that_generates_too_few_tokens_fails(monkeypatch, tmp_path):
    from verl_aqn.integrations.verl.engine_probe import EngineProbe

    probe = EngineProbe.__new__(EngineProbe)
    short = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])])
    probe.llm = SimpleNamespace(reset_prefix_cache=lambda: None, generate=lambda *_, **__: [short])
    monkeypatch.setitem(__import__("sys").modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    with pytest.raises(AssertionError):
        probe.tokens_per_second(1, 4, 3)


def test_a_chip_that_serves_bf16_has_no_packed_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(speed_rungs, "serve", lambda *_, **__: SimpleNamespace(form="bf16"))
    assert answer("speed_rungs.packed", Context("npu", 1, tmp_path))["status"] == NOT_RUN


def test_every_reading_can_be_written_as_json(tmp_path):
    assert json.loads(json.dumps(run_rungs.compared(peaks(1, 1), MEMORY, "cuda").figures))


def test_the_reference_s_adapter_is_on_every_layer_but_the_head():
    import torch

    model = torch.nn.ModuleDict({"q": torch.nn.Linear(64, 32), "lm_head": torch.nn.Linear(64, 8)})
    assert reference_model.adapted(model) == {"q": (64, 32)}
