"""What the cost model counts, what is fitted to runs, and what a projection does with more devices."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from verl_aqn.bench.cost import DEVICES, Load, Work, active, bound, forward, limit_s, phases, training
from verl_aqn.bench.growth import HELD_OUT, SERIES, Point, exponents, roofline, settings, table
from verl_aqn.bench.scale import COUNTS, GROWTH, fit_reached, of_growth, project, project_recipe, scale_table
from verl_aqn.bench.shapes import SHAPES, write_config
from verl_aqn.bench.step import PHASES
from verl_aqn.cli.plots import plot_growth
from verl_aqn.config.compose import load_recipe
from verl_aqn.preflight.memory_plan import sizes
from verl_aqn.preflight.sizing import shape_of

LOAD = Load(prompts=128, samples=8, prompt=100, response=250, longest=1024)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    return shape_of(write_config("1.5B", tmp_path_factory.mktemp("model")), ())


@pytest.fixture(scope="module")
def given():
    return sizes(load_recipe("e12_aggressive_1ep", ["profile=cuda", "experiment=gsm8k"]))


@pytest.mark.parametrize(
    ("name", "published"),
    [("135M", 134.5e6), ("360M", 361.8e6), ("1B", 1.236e9), ("1.5B", 1.54e9), ("7B", 7.62e9), ("32B", 32.8e9)],
)
def test_shapes_have_the_parameters_of_their_models(name, published, tmp_path):
    assert shape_of(write_config(name, tmp_path), ()).parameters == pytest.approx(published, rel=0.005)


def counted(name: str, tmp_path, *, backward: bool) -> tuple[float, float]:
    """Operations that PyTorch counts of two rows of 64 tokens with adapters of rank 8, and ours."""
    folder = write_config(name, tmp_path)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 3
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
        model.lm_head.weight.requires_grad_(False)
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
        ids = torch.zeros(2, 64, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            loss = adapted(input_ids=ids, position_ids=torch.arange(64)[None]).logits.float().sum()
            if backward:
                loss.backward()
    whole = shape_of(folder, ())
    three = replace(whole, layers=3, linears=3 * whole.layer_linears, adapted=whole.adapted * 3 // whole.layers)
    once = forward(three, 8, 128, 128, 64)
    return counter.get_total_flops(), 2 * once + 2 * 8 * three.adapted * 128 if backward else once


@pytest.mark.parametrize("name", ["135M", "1.5B"])
@pytest.mark.parametrize(("backward", "within"), [(False, 0.001), (True, 0.03)])
def test_operations_are_those_that_pytorch_counts(name, backward, within, tmp_path):
    torchs, ours = counted(name, tmp_path, backward=backward)
    assert ours == pytest.approx(torchs, rel=within)


def test_an_expert_model_counts_the_experts_of_a_token(shape):
    moe = replace(shape, linears=shape.linears * 4, routed=8, experts=2)
    idle = shape.layers * 3 * shape.hidden * shape.inner * 3  # six of eight, two of them make `inner`
    assert active(moe) == shape.linears * 4 - idle


@pytest.mark.parametrize("ranks", [16, 64])
def test_ranks_share_the_operations_and_gather_the_packed_base(shape, given, ranks):
    one, many = (training(shape, replace(given, ranks=n), LOAD, 16384, update=True) for n in (1, ranks))
    assert one.received == 0
    assert many.operations * ranks == pytest.approx(one.operations)
    passes = 3  # with gradient checkpointing
    base = passes * many.turns * (shape.linears * 0.53125 + 2 * shape.kept)
    assert many.received == pytest.approx((base + 8 * given.rank * shape.adapted) * (ranks - 1) / ranks)


def test_shared_prompts_save_operations(shape, given):
    separate, shared = (
        training(shape, replace(given, ranks=1, padded=padded), LOAD, 16384, update=False) for padded in (False, True)
    )
    assert shared.operations < separate.operations * 0.9


def test_generation_waits_for_the_longest_answer_and_for_room(shape, given):
    here = replace(given, ranks=8, tensor_parallel=1)
    roomy, tight = (phases(shape, here, LOAD, cache)["generation"] for cache in (40e9, 0.2e9))
    assert roomy.turns == LOAD.longest
    assert tight.turns > roomy.turns
    assert tight.read > roomy.read
    assert tight.operations == roomy.operations


def test_limits():
    device = DEVICES["h100"]
    assert limit_s(Work(operations=989e12, read=1.0), device, 8) == pytest.approx(1.0)
    assert limit_s(Work(read=3.35e12, received=450e9), device, 8) == pytest.approx(2.0)
    assert limit_s(Work(received=450e9), device, 16) == pytest.approx(9.0)
    assert bound(Work(operations=1.0, received=450e9), device, 16) == "network"


def test_what_a_phase_reaches_is_found_again():
    device = DEVICES["h100"]
    works = [Work(operations=n * 989e12, turns=turns) for n, turns in ((1, 5), (2, 50), (5, 7), (9, 100))]
    seconds = [2.5 * limit_s(work, device, 1) + 0.03 * work.turns + 0.7 for work in works]
    found = fit_reached(seconds, works, device)
    assert (found.times, found.turn, found.once) == pytest.approx((2.5, 0.03, 0.7))


def test_exponents_and_their_intervals():
    flat = dict.fromkeys(("generation", "log-probs", "update", "sync", "memory: actor", "memory: rollout"), 1.0)
    noisy = ((4, 1.02), (8, 0.98), (16, 0.98), (32, 1.02))
    rows = [{"samples": n, **flat, "step": 3 * n**1.5 * noise} for n, noise in noisy]
    slope, low, high = exponents(rows, {"samples": [0, 1, 2, 3]})["samples"]["step"]
    assert slope == pytest.approx(1.5, abs=0.01)
    assert low < 1.5 < high < low + 0.3
    assert exponents(rows, {"samples": [0, 1]}) == {}


def test_a_run_of_growth_has_the_sizes_of_its_point(tmp_path):
    config = load_recipe("e12_aggressive_1ep", settings(Point("360M", samples=16, response=48), tmp_path, 2))
    assert (config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size) == (2, 2)
    assert (config.actor_rollout_ref.rollout.n, config.data.max_response_length) == (16, 48)
    assert config.actor_rollout_ref.rollout.max_model_len >= config.data.max_prompt_length + 48
    assert all(Point() in points for points in SERIES.values())
    assert not any(HELD_OUT in points for points in SERIES.values())


def test_the_recorded_curves_are_fitted_and_the_run_left_out_is_met():
    """The small end: what no parameter was fitted to is within a quarter of what was measured."""
    growth = json.loads(GROWTH.read_text())
    _, _, rows = of_growth(growth)
    assert rows[-1]["run"].endswith("(not fitted)")
    assert rows[-1]["fitted"]["step"] == pytest.approx(rows[-1]["measured"]["step"], rel=0.25)


def test_the_recorded_runs_have_a_table_and_a_picture(tmp_path):
    result = json.loads(GROWTH.read_text())
    console = Console(width=200, record=True)
    console.print(table(result), roofline(result))
    text = console.export_text()
    assert all(name in text for name in ("1.5B", "6 × 8", "~ samples^", "bound by"))
    plot_growth(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_more_devices_shorten_a_step_until_what_they_do_not_share_is_left(shape, given):
    rows = project(shape, given, LOAD, DEVICES["h100"], COUNTS, weak=False, beside=0.001)
    assert [row["devices"] for row in rows] == list(COUNTS)
    assert all(row["step"] >= row["limit"] for row in rows)
    assert rows[0]["update"] > rows[1]["update"]
    assert len({row["beside"] for row in rows}) == 1
    weak = project(shape, given, LOAD, DEVICES["h100"], COUNTS, weak=True, beside=0.001)
    assert weak[-1]["samples"] == 128 * weak[0]["samples"]
    assert weak[-1]["beside"] == pytest.approx(128 * weak[0]["beside"])


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_has_a_projection(device):
    result = project_recipe("7B", DEVICES[device], 100, 250, weak=False)
    assert ("bf16" in result["title"]) == (device in ("a2", "a3"))
    assert all(row[name] > 0 for row in result["rows"] for name in (*PHASES, "step", "limit"))
    console = Console(width=130, record=True)
    console.print(scale_table(result["rows"], result["title"]))
    assert "1,024" in console.export_text()


def test_shapes_are_named_by_size():
    assert list(SHAPES) == ["135M", "360M", "1B", "1.5B", "7B", "32B"]
