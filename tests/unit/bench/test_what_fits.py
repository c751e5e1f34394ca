"""The table of what fits where, beside published figures, and as the documentation shows it."""

from dataclasses import replace
from pathlib import Path

import pytest

from verl_aqn.bench.what_fits import DEVICES, MODELS, RECIPE, estimate, parts_table, shape, table
from verl_aqn.config.compose import load_recipe
from verl_aqn.preflight.device_plan import fewest, fit
from verl_aqn.preflight.memory_plan import DEVICE, cache_bytes, rollout, sizes

EXCLUDE = ("lm_head", "embed_tokens")


@pytest.fixture(scope="module")
def rows():
    return estimate(RECIPE)


def cuda(*overrides: str):
    return sizes(load_recipe(RECIPE, ["profile=cuda", *overrides]))


@pytest.mark.parametrize(
    ("model", "billions"),
    [("Qwen2.5-1.5B", 1.54), ("Qwen2.5-7B", 7.62), ("Llama-3.1-8B", 8.03), ("Qwen2.5-14B", 14.77),
     ("Qwen2.5-32B", 32.76), ("Llama-3.1-70B", 70.55)],
)  # fmt: skip
def test_models_have_the_parameters_that_they_are_published_with(model, billions):
    assert shape(model, EXCLUDE).parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_32b_packed_fits_on_one_device_of_80_gb_as_qerl_says_and_in_bf16_it_does_not():
    found = fewest(shape("Qwen2.5-32B", EXCLUDE), cuda(), 80 * 10**9)
    assert (found.fault, found.sizes.ranks, found.sizes.tensor_parallel) == ("", 1, 1)
    dense = fewest(shape("Qwen2.5-32B", EXCLUDE), cuda("aqn.mxfp4.enabled=false"), 80 * 10**9)
    assert dense.sizes.ranks > 1


def test_70b_fits_on_8_devices_of_80_gb_as_verl_says():
    given = replace(cuda("aqn.mxfp4.enabled=false"), bf16_master=True, ranks=8, tensor_parallel=8)
    found = fit(shape("Llama-3.1-70B", EXCLUDE), given, 80 * 10**9)
    assert (found.fault, found.sequences > 0) == ("", True)


def test_8b_s_cache_and_weights_are_those_that_unsloth_published():
    model, given = shape("Llama-3.1-8B", EXCLUDE), cuda("aqn.mxfp4.enabled=false")
    assert 20_000 * cache_bytes(model, given) / 2**30 == pytest.approx(2.5, abs=0.1)
    assert rollout(model, given, DEVICE, 0).resident["base"] / 1e9 == pytest.approx(16, abs=0.1)


def test_cells_fit_or_say_why_and_tell_that_they_are_estimated(rows):
    assert len(rows) == len(MODELS) * len(DEVICES)
    assert all(row["estimated"] for row in rows)
    for row in rows:
        share = row["rollout"]["bytes"] + sum(  # what the actor keeps while the rollout generates
            row["actor"]["parts"].get(part, 0) for part in ("process", "base", "adapter and Adam")
        )
        assert row["fault"] or (row["actor"]["bytes"] < row["device_bytes"] and share < row["device_bytes"])
    too_long = estimate(RECIPE, ["Llama-3.1-70B"], ["data.max_response_length=400000"])
    assert all(row["text"].startswith("no: ") for row in too_long)


def test_the_documentation_has_the_command_s_tables(rows):
    page = (Path(__file__).parents[3] / "docs" / "memory.md").read_text()
    assert table(rows) in page
    assert parts_table(rows, "H100") in page
