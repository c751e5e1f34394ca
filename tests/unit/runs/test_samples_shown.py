"""Several responses per problem, wherever runs are shown: `runs`, the console, a plan's lines, the page."""

import json

import pytest
from rich.console import Console as RichConsole

from tests.helpers.pages import page_of
from tests.helpers.run_folders import lines_of, write_run
from verl_aqn.launch.console import Console, result_table
from verl_aqn.runs.run_list import describe, table

RECORD = {
    "kind": "validation",
    "accuracy": 0.625,
    "items": 4,
    "samples": 4,
    "pass_at": {"1": 0.625, "2": 0.7, "4": 0.75},
}
TABLE = [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1]]


def shown(view) -> str:
    console = RichConsole(width=200)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


@pytest.fixture
def sampled(tmp_path):
    """Two finished runs with four responses to each of four problems, two of them alike, and one with one response."""
    prompts = ["1 + 1?", "2 + 2?", "1 + 1?", "3 + 3?"]
    runs = []
    for name, noise, answers in (("e6a", False, TABLE), ("e12", True, [[1] * 4, [0, 1, 0, 0], [1] * 4, [1] * 4])):
        run = write_run(tmp_path / name, name, noise=noise)
        for step, given in ((0, [[0] * 4] * 4), (4, answers)):
            right = sum(map(sum, given)) / 16
            run.append("metrics.jsonl", RECORD | {"step": step, "accuracy": right})
            text = "".join(json.dumps(line) + "\n" for line in lines_of(given, prompts))
            (run.path / f"validation/{step}.jsonl").write_text(text)
        runs.append(run)
    return [*runs, write_run(tmp_path / "old", "old")]


def test_the_listing(sampled):
    rows = [describe(run) for run in sampled]
    assert [row["samples"] for row in rows] == [4, 4, 1]
    assert rows[0]["pass_at"]["4"] == 0.75
    text = shown(table(rows))
    assert "pass@4 75.0" in text
    assert "pass@" not in shown(table(rows[2:]))


def test_the_console(sampled, capsys):
    assert "pass@4 75.0" in shown(result_table(sampled[0]))
    assert "of them" not in shown(result_table(sampled[2]))
    console = Console()
    console.record("metrics.jsonl", RECORD | {"step": 0})
    said = capsys.readouterr().err
    assert "avg@4 62.5 % (4 problems × 4 responses" in said
    assert "pass@4 75.0 %" in said


def test_the_page(sampled):
    text = page_of(*(run.path for run in sampled[:2])).text
    assert "pass@2 70.0, pass@4 75.0" in text
    assert "10 of 16" in text
    assert "on the same 4 items: +62.5 points" in text
    assert "avg@4, %" in text
    assert "e12 against e6a: not enough data. +18.8 points" in text
    assert "pass@" not in page_of(sampled[2].path).text
