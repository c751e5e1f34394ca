"""Check that recipes/README.md has a row for each recipe, with the σ and the steps that the recipe has."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from verl_aqn.config.compose import load_recipe, plan_names, recipe_names
from verl_aqn.config.schema import parse_aqn
from verl_aqn.runs.run_list import sigmas

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
TEXT = (FOLDER / "README.md").read_text()
LINES = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
ROWS = {cells[0].strip("`"): cells[1:] for cells in LINES if len(cells) == 6}


def test_every_recipe_has_a_row_and_every_row_a_recipe():
    assert sorted(cells[0].strip("`") for cells in LINES if len(cells) == 6) == recipe_names()


def test_every_other_file_is_named():
    named = set(re.findall(r"^\| `([^`]+\.\w+)` \|", TEXT, re.MULTILINE))
    assert named == {"base.yaml", "minimal.py", *(f"plans/{name}.yaml" for name in plan_names())}
    files = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.suffix in (".yaml", ".py")}
    assert files == named | {f"{name}.yaml" for name in recipe_names()}


@pytest.mark.parametrize("recipe", sorted(ROWS))
def test_a_row_has_the_recipe_s_noise_and_steps_and_a_number_or_not_run(recipe):
    purpose, sigma, steps, embedded, gsm8k = ROWS[recipe]
    config = load_recipe(recipe, ["profile=cpu"])
    noise = parse_aqn(config).noise
    assert purpose
    if rule := noise.controller:
        assert sigma == f"{sigmas(asdict(noise))} {rule.ends(int(steps)).removesuffix(' nats a token')}"
    elif noise.enabled:
        assert [float(end) for end in sigma.split(" → ")] == [noise.sigma_start, noise.sigma_end]
    else:
        assert sigma == "none"
    assert int(steps) == config.trainer.total_training_steps
    for result in (embedded, gsm8k):
        # A number says by [1], [2] or [3] how it was measured.
        assert result == "not run" or re.search(r"\d+\.\d.*\[[123]\]$", result)


def test_the_numbers_are_on_a_page_of_results():
    root = FOLDER.parent
    pages = "".join(path.read_text() for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))))
    for recipe, cells in ROWS.items():
        for number, low, high in re.findall(r"([\d.]+) % \[([\d.]+), ([\d.]+)\] \[2\]", cells[3]):
            assert f"{number} [{low}, {high}]" in pages, recipe
