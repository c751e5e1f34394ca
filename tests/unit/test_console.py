"""What a person reads of validations: a line while the run goes on, a table at its end, also of older records."""

from rich.console import Console as RichConsole

from verl_aqn.console import Console, result_table
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats import share_text

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


def test_a_validation_is_told_by_all_rules_that_it_was_scored_by(capsys):
    console = Console()
    console.record("metrics.jsonl", OLD)
    assert capsys.readouterr().err.split("accuracy ")[1] == "41.7 % (80 of 192; 95 % interval 34.9–48.7 %)\n"
    console.record("metrics.jsonl", NEW | {"step": 0})
    assert "flexible 87.5 [82.1, 91.5], math-verify 50.0 [43.0, 57.0]\n" in capsys.readouterr().err
