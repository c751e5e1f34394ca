"""Validations in the console: a line during the run and a table at its end, also for older records."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console as RichConsole

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.launch.console import Console, failed_text, is_targets_task, result_table, verdict
from verl_aqn.launch.supervise import Outcome
from verl_aqn.launch.train import Prepared
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.stats.intervals import share_text
from verl_aqn.tasks.parquet import row, write_parquet

OLD = {"kind": "validation", "step": 0, "accuracy": 80 / 192, "items": 192}
NEW = {"kind": "validation", "step": 29, "accuracy": 162 / 192, "flexible": 0.875, "math_verify": 0.5, "items": 192}


def test_a_share_in_percent_with_wilsons_interval():
    assert share_text(162 / 192, 192) == "84.4 [78.6, 88.8]"
    assert share_text(0.0, 20) == "0.0 [0.0, 16.1]"
    assert share_text(None, 192) == "–"


def test_the_table_has_a_column_a_rule_and_fits_80_columns(tmp_path):
    run = RunFolder(tmp_path)
    for record in (OLD, NEW):
        run.append("metrics.jsonl", record)
    console = RichConsole(width=80)
    with console.capture() as captured:
        console.print(result_table(run))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines() if "│" in line]
    assert rows == [
        ["0", "41.7 [34.9, 48.7]", "–", "–", "192"],
        ["29", "84.4 [78.6, 88.8]", "87.5 [82.1, 91.5]", "50.0 [43.0, 57.0]", "192"],
    ]


def test_the_base_is_named_by_the_rule_that_its_folder_records(tmp_path, capsys):
    run = open_run(tmp_path / "base", {})
    config = load_recipe("e12", ["profile=cpu"])
    prepared = Prepared(config=config, steps=29, rows={"train": 1, "test": 1}, source=Path("model"))
    Console().start(run, prepared)
    assert "model, MXFP4 (rounded by another tool) base" in capsys.readouterr().err
    run.write_text("quantization.json", '{"scale_rule": "even"}')
    Console().start(run, prepared)
    assert "model, MXFP4 (even) base" in capsys.readouterr().err


def todo_of(tmp_path, target: dict, model: str, sources: list[str]) -> Prepared:
    for source in sources:
        prompt = [{"role": "user", "content": "1 + 1"}]
        made = row(source, prompt, "2", split="test", index=0, question="1 + 1", answer="#### 2")
        write_parquet([made], tmp_path / f"{Path(source).name}.parquet")
    files = [str(file) for file in tmp_path.glob("*.parquet")]
    config = OmegaConf.create({"data": {"val_files": files}, "aqn": {"target": target}})
    return Prepared(config=config, steps=29, rows={}, source=Path(model))


QWEN = "hub/models--Qwen--Qwen2.5-1.5B-Instruct/snapshots/1"


@pytest.mark.parametrize(
    ("model", "sources", "problems", "same"),
    [
        (QWEN, ["openai/gsm8k"], 1319, True),
        (QWEN, ["openai/gsm8k"], 200, False),
        (QWEN, ["openai/gsm8k", "math"], 1319, False),
        ("models/Qwen2.5-7B-Instruct", ["openai/gsm8k"], 1319, False),
    ],
)
def test_a_target_is_for_its_model_on_its_problems(tmp_path, model, sources, problems, same):
    target = load_recipe("e12_aggressive_1ep", ["profile=cpu"]).aqn.target
    prepared = todo_of(tmp_path, target, model, sources)
    assert is_targets_task(parse_aqn(prepared.config).target, prepared, problems) is same


@pytest.mark.parametrize(
    ("target", "model", "words"),
    [
        ({}, QWEN, "84.4 % (162 of 192; 95 % interval 78.6–88.8 %)."),
        ({"accuracy": 0.7}, QWEN, "the recipe's target (above 70.00 %) is met, and the interval excludes 70.00 %."),
        (
            {"accuracy": 0.7, "model": "Qwen2.5-1.5B-Instruct", "problems": 1319},
            "SmolLM2-135M-Instruct",
            "The recipe's target of 70.00 % is for model Qwen2.5-1.5B-Instruct, 1,319 problems: it is not comparable",
        ),
    ],
)
def test_the_verdict_is_about_the_recipe_s_target(tmp_path, target, model, words):
    run = RunFolder(tmp_path)
    run.append("metrics.jsonl", NEW)
    text = verdict(run, todo_of(tmp_path, target, model, ["openai/gsm8k"]))
    assert words in text
    assert ("target" in text) == bool(target)


def test_a_validation_is_told_by_all_rules_that_it_was_scored_by(capsys):
    console = Console()
    console.record("metrics.jsonl", OLD)
    assert capsys.readouterr().err.split("accuracy ")[1] == "41.7 % (80 of 192; 95 % interval 34.9–48.7 %)\n"
    console.record("metrics.jsonl", NEW | {"step": 0})
    assert "flexible 87.5 [82.1, 91.5], math-verify 50.0 [43.0, 57.0]\n" in capsys.readouterr().err


def test_a_path_is_told_with_all_its_brackets(capsys):
    Console().say("run      /tmp/sweep[lr1e-4]/a[/b]")
    Console().warn("/tmp/sweep[lr1e-4]")
    told = capsys.readouterr().err.splitlines()
    assert [line[8:] for line in told] == ["run      /tmp/sweep[lr1e-4]/a[/b]", "warning: /tmp/sweep[lr1e-4]"]


def test_an_error_is_told_with_all_its_brackets(tmp_path, capsys):
    words = "[/pytorch/third_party/gloo/pair.cc:534] Connection closed by peer [enforce fail at alloc_cpu.cpp:117]"
    prepared = Prepared(config=OmegaConf.create(), steps=29, rows={}, source=tmp_path)
    assert Console().end(RunFolder(tmp_path), prepared, Outcome("failed", words)) == 1
    assert capsys.readouterr().err == f"error: {words} (log: {tmp_path / 'training.log'})\n"


def test_failed_answers_are_in_the_result(tmp_path):
    run = RunFolder(tmp_path)
    for step, failed in ((0, None), (1, 0)):
        run.append("metrics.jsonl", {"kind": "validation", "step": step, "failed": failed})
        run.append("metrics.jsonl", {"kind": "step", "step": step, "metrics": {"aqn/answers_failed": 0.0}})
    run.append("metrics.jsonl", {"kind": "step", "step": 2, "metrics": {}})  # of an older version
    assert failed_text(run) == ""
    run.append("metrics.jsonl", {"kind": "validation", "step": 3, "failed": 2})
    run.append("metrics.jsonl", {"kind": "step", "step": 3, "metrics": {"aqn/answers_failed": 1.0}})
    assert failed_text(run).startswith(
        "failed: 1 training responses, which were not trained on, and 2 validation responses,"
    )
