"""Growth of a step with model, samples and length: the runs, the fitted exponents, table and picture."""

import pytest
from rich.console import Console

from verl_aqn.bench.growth import SERIES, Point, exponents, settings, table
from verl_aqn.bench.shapes import write_config
from verl_aqn.cli.plots import plot_growth
from verl_aqn.config.compose import load_recipe
from verl_aqn.preflight.sizing import shape_of

FLAT = dict.fromkeys(("generation", "log-probs", "update", "sync", "memory: actor", "memory: rollout"), 1.0)


@pytest.mark.parametrize(
    ("name", "published"),
    [("135M", 134.5e6), ("360M", 361.8e6), ("1B", 1.236e9), ("1.5B", 1.54e9), ("7B", 7.62e9), ("32B", 32.8e9)],
)
def test_shapes_have_the_parameters_of_their_models(name, published, tmp_path):
    assert shape_of(write_config(name, tmp_path), ()).parameters == pytest.approx(published, rel=0.005)


def test_exponents_and_their_intervals():
    noisy = ((4, 1.02), (8, 0.98), (16, 0.98), (32, 1.02))
    rows = [{"samples": n, **FLAT, "step": 3 * n**1.5 * noise} for n, noise in noisy]
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


def test_a_result_has_a_table_and_a_picture(tmp_path):
    rows = [
        {"model": "135M", "prompts": 2, "samples": n, "response": 24, **FLAT, "step": 2.5 * n} for n in (4, 8, 16, 32)
    ]
    series = {"samples": [0, 1, 2, 3]}
    result = {"device": "a CPU", "steps": 2, "rows": rows, "series": series, "exponents": exponents(rows, series)}
    console = Console(width=200, record=True)
    console.print(table(result))
    text = console.export_text()
    assert all(words in text for words in ("2 × 32", "80.00", "~ samples^", "1.00 [1.00, 1.00]"))
    plot_growth(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
