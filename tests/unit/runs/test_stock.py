"""Evidence of a stock run: the judge's findings, the allowed settings, and the adapter that an actor holds."""

import copy
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from verl_aqn.checkpoints.actual_adapter import actual_adapter
from verl_aqn.config.stock_settings import DIR_VARIABLE, OPTION, StockSettings, check_supported, is_stock
from verl_aqn.errors import ConfigError
from verl_aqn.runs.evidence import judge_run
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.judge.records import Done
from verl_aqn.runs.judge.stock_records import StockJudge, is_visible
from verl_aqn.runs.report.page import write_report

BASE = next(
    record
    for record in RunFolder(Path(__file__).parent / "real_runs" / "actor").read("evidence.jsonl")
    if record["kind"] == "base"
)
PLACED = {
    "kind": "placed", "evidence": 2, "stock": True, "actor_nodes": ["a"], "rollout_nodes": ["a"], "rollout_ranks": 1,
}  # fmt: skip

ENDED = {"kind": "requests", "when": "end", "listed": [True], "requests": {"with": 4, "without": 0}}


def base(when: str) -> dict[str, Any]:
    files = BASE["files"] | ({"tensors": 0, "read": "at the start"} if when == "end" else {})
    return BASE | {"when": when, "files": files}


def adapter(step: int, digest: str = "", **more: Any) -> dict[str, Any]:
    digest = digest or f"digest {step}"
    answer = {"adapter_digest": digest, "modules": 14, "b_max": 0.1, "dtype": "bfloat16"}
    requests = {"with": 8 * bool(step), "without": 0}
    record = {
        "kind": "adapter", "step": step, "sent": digest, "expected": [digest], "modules": 14, "bytes": 100,
        "faults": [], "actual": [answer], "listed": [True], "requests": requests, "uncovered": [],
    }  # fmt: skip
    return record | more


def mismatch(step: int, mean: float = 0.01) -> dict[str, Any]:
    return {
        "kind": "mismatch", "step": step, "source": "sampled", "tokens": 64, "warn": 0.2, "stop": 1.0,
        "abs_dlogp_mean": mean, "abs_dlogp_error": 0.001, "abs_dlogp_p99": 0.05, "kl_k3": 0.0, "clipped_share": 0.0,
    }  # fmt: skip


def use(step: int, effect: float = 0.4, to_adapter: float = 0.01, to_base: float = 0.4) -> dict[str, Any]:
    return {
        "kind": "adapter use", "step": step, "tokens": 64, "effect": effect, "to_adapter": to_adapter,
        "to_base": to_base, "nearer": to_adapter - to_base, "error": 0.01,
    }  # fmt: skip


def good() -> list[dict[str, Any]]:
    return [
        PLACED, base("start"), adapter(0), mismatch(1), adapter(1), mismatch(2), use(2), adapter(2), ENDED, base("end"),
    ]  # fmt: skip


def faults(records: list[dict[str, Any]], steps: int = 2, finished: bool = True) -> list[str]:
    judge = StockJudge()
    found = [fault for record in records if (fault := judge.add(copy.deepcopy(record)))]
    done = Done(steps=range(1, steps + 1), validations=(), rescored=(), finished=finished)
    return found + [fault for _, fault in judge.missing(done)]


def test_records_of_a_whole_run_hold():
    assert faults(good()) == []


@pytest.mark.parametrize("place", range(len(good())))
def test_a_record_that_is_not_there_is_missed(place):
    records = good()
    left_out = records.pop(place)
    assert bool(faults(records)) == (left_out["kind"] != "adapter use")  # the trainer decides which steps have one


NOT_IN_ROLLOUT = {
    "nothing came": ({"actual": [{"fault": "the rollout has no adapter"}]}, "is not in the rollout (rank 0)"),
    "another": ({"actual": [adapter(1, "other")["actual"][0]]}, "the adapter in the rollout is not the actor's"),
    "that of the step before": (
        {"actual": adapter(0)["actual"]},
        "after step 1 the adapter in the rollout is not the actor's",
    ),
    "not listed": ({"listed": [False]}, "does not list the adapter"),
    "no replica": ({"listed": []}, "does not list the adapter"),
    "no rank": ({"actual": [], "expected": []}, "0 of 1 ranks reported their adapter"),
    "fewer modules": ({"modules": 15}, "an adapter on [14] modules, the actor on 15"),
    "a part": ({"sent": "whole"}, "holds just a part of the adapter"),
    "not covered": ({"uncovered": ["q_proj.A"]}, "do not hold all of the adapter of q_proj.A"),
    "not sent": ({"faults": ["lora_magnitude_vector is trained"]}, "lora_magnitude_vector is trained"),
    "some without": ({"requests": {"with": 7, "without": 1}}, "1 of 8 requests were answered without the adapter"),
    "no request": ({"requests": {"with": 0, "without": 0}}, "no request to the rollout was seen"),
    "not finite": ({"actual": [adapter(1)["actual"][0] | {"b_max": float("nan")}]}, "is not finite"),
}


@pytest.mark.parametrize("case", NOT_IN_ROLLOUT)
def test_an_adapter_that_is_not_the_actors_is_told(case):
    change, text = NOT_IN_ROLLOUT[case]
    records = good()
    records[4] = adapter(1, **change)
    found = faults(records)
    assert any(text in fault for fault in found), found


def test_a_rollout_that_answers_as_the_base_model_is_told():
    records = good()
    records[6] = use(2, effect=0.4, to_adapter=0.4, to_base=0.01)
    assert any("responds like the base model without the adapter" in fault for fault in faults(records))
    records[6] = use(2, effect=0.01, to_adapter=0.02, to_base=0.02)  # too small to tell
    assert not is_visible(records[6])
    assert faults(records) == []
    records[6] = use(2) | {"nearer": 0.0}
    assert any("contradict each other" in fault for fault in faults(records))


def test_a_last_validation_without_the_adapter_is_told():
    records = good()
    records[8] = ENDED | {"requests": {"with": 0, "without": 4}}
    assert any("at the end: 4 of 4 requests were answered without the adapter" in fault for fault in faults(records))


def test_a_mismatch_above_its_bound_and_a_record_of_noise_are_faults():
    records = good()
    records[3] = mismatch(1, 1.5)
    assert any("step 1: " in fault and "above 1" in fault for fault in faults(records))
    records[3] = {"kind": "mismatch", "step": 1, "source": None, "reason": "top_p"}
    assert faults(records) == []
    assert any("'noise'" in fault for fault in faults([*good(), {"kind": "noise", "step": 0, "rank": 0}]))


def test_a_folder_is_judged_by_what_its_config_says(tmp_path):
    run = open_run(tmp_path, {"a": 1})
    run.write_text("config.yaml", "actor_rollout_ref: {model: {external_lib: [mine, verl_aqn.stock]}}")
    run.append("events.jsonl", {"kind": "attempt", "evidence": 2})
    for record in good():
        run.add_evidence(record)
    for step in (1, 2):
        run.append("metrics.jsonl", {"kind": "step", "step": step, "metrics": {}})
    judgement = judge_run(run, finished=True)
    assert judgement.faults == []
    assert write_report([run.path], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "16 requests used it, none ran without it" in page
    assert "the rollout is 0.01 from the actor with the adapter and 0.4 from the actor without it" in page
    assert {kind for kind, one in judgement.findings.items() if one.good} == {
        "placed", "base", "adapter", "mismatch", "adapter use", "requests",
        "chain",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("external", "stock"),
    [
        ("verl_aqn.stock", True),
        (["a", "verl_aqn.stock"], True),
        ("verl_aqn.integrations.verl.engine", False),
        (None, False),
    ],
)
def test_which_config_is_that_of_a_stock_run(external, stock):
    assert is_stock({"actor_rollout_ref": {"model": {"external_lib": external}}}) is stock
    assert not is_stock({})


@pytest.mark.parametrize("wrong", [{"on_fault": "go on"}, {"warn": 2.0}, {"stop": float("inf")}, {"warn": "much"}])
def test_settings_that_are_none(wrong):
    with pytest.raises(ConfigError, match=rf"verl_aqn\.{next(iter(wrong))}"):
        StockSettings(**wrong)


def test_where_the_records_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DIR_VARIABLE, raising=False)
    assert StockSettings().base.parent == tmp_path / "verl_aqn_evidence"
    monkeypatch.setenv(DIR_VARIABLE, "by/variable")
    assert StockSettings().base == tmp_path / "by" / "variable"
    assert StockSettings(dir="/by/key").base == Path("/by/key")


def test_the_page_names_every_setting_and_every_refusal():
    page = (Path(__file__).parents[3] / "docs" / "stock_verl.md").read_text()
    assert f"actor_rollout_ref.model.external_lib={OPTION}" in page
    for field in fields(StockSettings):
        assert f"| `verl_aqn.{field.name}` |" in page
    assert f"`{DIR_VARIABLE}`" in page
    source = inspect.getsource(check_supported)
    keys = re.findall(r'"((?:trainer|actor_rollout_ref)\.[a-z_0-9.]+)"', source)
    assert len(keys) > 8
    for key in keys:
        assert f"`{key}" in page, key


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)


def test_the_adapter_that_an_actor_holds():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(TwoLayers(), LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj"]))
    with torch.no_grad():
        model.base_model.model.q_proj.lora_B.default.weight.normal_()
    actual = actual_adapter(model)
    name = "base_model.model.q_proj.lora_{}.weight"
    assert sorted(actual.tensors) == [name.format("A"), name.format("B")]
    assert actual.faults == []
    b = model.base_model.model.q_proj.lora_B.default.weight.detach()
    served = actual.served(torch.bfloat16)
    assert torch.equal(served[name.format("B")], b.bfloat16() * (3 / 2**0.5))
    assert torch.equal(served[name.format("A")], actual.tensors[name.format("A")].bfloat16())
    model.base_model.model.o_proj.bias.requires_grad_(True)
    assert "o_proj.bias is trained" in actual_adapter(model).faults[0]
