"""`verl-aqn report`: the content of the page, and that every run folder, whatever it contains, gives a page."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.command import run_all
from tests.helpers.pages import Text, page_of
from tests.helpers.run_folders import BASE, metrics, write_run
from verl_aqn.errors import ConfigError, DataError
from verl_aqn.runs.folder import RunFolder, open_run
from verl_aqn.runs.report.answers import read_answers
from verl_aqn.runs.report.charts import Chart, Series, number
from verl_aqn.runs.report.evidence_section import checks, noise_table
from verl_aqn.runs.report.page import write_report
from verl_aqn.runs.report.page_data import QUANTIZATION, read_runs
from verl_aqn.runs.report.sections import NESTED, OUTSIDE, PHASES, accuracy, bases, times


def test_one_run(tmp_path):
    page = page_of(write_run(tmp_path).path)
    for text in (
        "e12, seed 0",
        "44.4 % [18.9, 73.3]",  # Wilson's of 4 of 9
        "rollout.top_p=0.9: biased",
        "0.0 % -> 44.4 % on the same 9 items",
        "Reward Mean over a step's responses, under the step's noise. Reward 0.4",
        "as scheduled in 4 of 4 readings, in 5 modules; σ within its 95 % sampling interval in 3 of 3",
        "equal in 4 of 4 syncs",
        "bitwise equal to those at the start in 2 of 2 readings",
        f"packed modules {BASE[:12]} on disk = actor = rollout (start and end)",
        "Scale rule mse, 6 matrices, 18.90 dB over all",
        "9 of 9 validation problems",
        "abcdef0 + changes",
    ):
        assert text in page.text
    assert "Comparison" not in page.text
    assert "✗ no:" not in page.text


def test_nothing_is_fetched_and_only_our_script_runs(tmp_path):
    page = page_of(write_run(tmp_path).path)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "formaction"} & attributes.keys()
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes), tag
    (policy,) = (one["content"] for tag, one in page.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert [one for tag, one in page.tags if tag == "script"] == [{}, {"type": "application/json", "id": "data"}]


EVIL = (
    "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='alert(3)' {{ 7 * 7 }} \ud800"
)


def test_what_a_model_or_a_config_says_is_only_ever_text(tmp_path):
    answers = {f"{EVIL} {number}": (EVIL, EVIL, number % 2 == 0) for number in range(3)}
    config = {"trainer": {"experiment_name": EVIL}, EVIL: {EVIL: EVIL}}
    runs = [
        write_run(tmp_path / name, name, answers=answers, config=config, status="failed", message=EVIL).path
        for name in ("a", "b")
    ]
    write_report(runs, tmp_path / "page.html")
    source = (tmp_path / "page.html").read_text()
    page = Text(source)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in page.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert(1)</script>") > 9
    assert "{{ 7 * 7 }}" in page.text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source)
    assert not set("<>&'") & set(data)
    json.loads(data)


def test_two_runs_side_by_side(tmp_path):
    shared = {"1 + 1?": ("2", "#### 2", True), "2 + 2?": ("4", "#### 5", False)}
    other = {"1 + 1?": ("2", "#### 3", False), "2 + 2?": ("4", "#### 5", False)}
    control = write_run(tmp_path / "a", "e6a", noise=False, answers=shared).path
    noisy = write_run(
        tmp_path / "b", "e12", answers=other, config={"aqn": {"seed": 0, "noise": {"enabled": True}}}
    ).path
    page = page_of(control, noisy)
    assert "e12 against e6a: not enough data." in page.text
    assert "aqn.noise.enabled False True" in page.text
    assert "e6a, seed 0, after step 4 ✓ right #### 2" in page.text
    assert "e12, seed 0, after step 4 ✗ wrong #### 3" in page.text
    found = read_answers(read_runs([control, noisy]), 9)
    assert sorted(item.kind for item in found.items) == ["differ", "wrong"]
    assert [one["data-chart"] for _, one in page.tags if one.get("data-chart", "").startswith("sqnr")] == ["sqnr0"]


def test_more_runs_than_colours_share_their_recipe_s(tmp_path):
    runs = [write_run(tmp_path / str(at), ("e6a", "e12")[at % 2]).path for at in range(10)]
    assert [run.colour for run in read_runs(runs[:8])] == [*range(8)]
    assert [run.colour for run in read_runs(runs)] == [0, 1] * 5
    drawn = [one for tag, one in page_of(*runs).tags if tag == "g" and "data-run" in one]
    assert drawn
    assert all(one["class"].split()[0] == f"c{int(one['data-run']) % 2}" for one in drawn)


def test_of_several_arms_the_page_says_what_is_corrected(tmp_path):
    noise = [{"enabled": False}, {"enabled": True}, {"enabled": True, "sigma_start": 0.01}]
    runs = [
        write_run(tmp_path / str(at), f"arm{at}", config={"aqn": {"seed": 0, "noise": one}}).path
        for at, one in enumerate(noise)
    ]
    assert "differences and p corrected for 2 contrasts" in page_of(*runs).text
    assert "corrected for" not in page_of(*runs[:2]).text


def test_the_page_says_as_compare_does_that_the_code_of_runs_is_not_known(tmp_path):
    runs = [write_run(tmp_path / name, name, noise=name == "e12").path for name in ("e6a", "e12")]
    said = "It cannot be checked that these runs had the same code: 2 of 2 have no commit on record, or had changes"
    assert said in page_of(*runs).text


def test_an_answer_that_the_reward_told_no_accuracy_of_is_not_on_record_everywhere_on_the_page(tmp_path):
    answers = {"1 + 1?": ("2", "#### 2", True), "2 + 2?": ("4", "four", None)}
    runs = [write_run(tmp_path / name, name, noise=name == "b", answers=answers).path for name in ("a", "b")]
    page = page_of(*runs)
    assert "acc=null for 1 of 2 responses, which is neither 0 nor 1" in page.text
    assert "on the same 2 items" not in page.text
    assert "b, seed 0, after step 4 not recorded four" in page.text
    assert "b, seed 0, after step 4 ✓ right #### 2" in page.text


def test_answers_that_failed_are_in_the_table_and_not_on_record_in_older_runs(tmp_path):
    run = RunFolder(write_run(tmp_path, "a").path)
    steps = run.by_step("metrics.jsonl", "validation")
    old, new = min(steps), max(steps)
    run.append("metrics.jsonl", steps[new] | {"answered": 6, "failed": 3})
    _, table = accuracy(read_runs([run.path]))
    told = {row[1].text: row[5].text for row in table.rows}
    assert told == {str(old): "not recorded", str(new): "3"}


def test_runs_that_cannot_be_compared_are_shown_with_the_reason(tmp_path):
    one = write_run(tmp_path / "a", "e12").path
    two = write_run(tmp_path / "b", "e12", status="failed", message="out of memory").path
    page = page_of(one, two)
    assert "There is no paired test:" in page.text
    assert "is failed: only finished runs can be compared" in page.text
    assert "out of memory" in page.text
    assert f"e12, seed 0 ({one.name[-6:]})" in page.text  # labels are distinct


@pytest.mark.parametrize("status", ["failed", "interrupted", None])
def test_a_run_that_wrote_nothing_gives_a_page(tmp_path, status):
    run = open_run(tmp_path, {})
    if status:
        run.set_status(status, "no memory")
    page = page_of(run.path)
    run.close()
    assert (status or "running") in page.text
    for text in ("No validation", "No step", "No evidence", "No responses", "No config", "stopped before it loaded"):
        assert text in page.text
    if not status:
        assert "it was killed" in page_of(run.path).text


def test_records_of_an_older_version_and_odd_ones_give_a_page(tmp_path):
    run = write_run(tmp_path, steps=2)
    for record in (
        {"kind": "step", "step": 3},
        {"kind": "step", "step": 4, "metrics": {"critic/score/mean": float("nan"), "aqn/sigma": float("inf")}},
        {
            "kind": "step",
            "step": 5,
            "metrics": {"timing_s/gen": 1.0, "aqn/groups": 0.0, "aqn/groups_without_variance": 0.0},
        },
        {"kind": "validation", "step": 3},
        {"kind": "validation", "step": 4, "accuracy": 0.0, "items": 0},
    ):
        run.append("metrics.jsonl", record)
    for record in (
        {"kind": "noise", "step": 2, "sigma_target": 0.1},
        {"kind": "noise"},
        {"kind": "clean", "step": None},
        {"kind": "adapter", "step": 3},
        {"kind": "base", "when": "end", "disk": BASE},
        {"kind": "strength"},
        {"kind": "strength", "clean": {"entropy": [1, 0, 2]}, "noisy": {"kl": [1, 0, 2], "entropy": [1, 0, 2]}},
        {"kind": "of the future"},
    ):
        run.append("evidence.jsonl", record)
    run.append("validation/4.jsonl", {"output": "no prompt and no verdict"})
    page = page_of(run.path)
    assert "no prompt and no verdict" in page.text
    page = page_of(run.path, write_run(tmp_path / "other", seed=1).path)
    assert "e12, seed 1" in page.text


def test_of_a_step_taken_twice_the_later_record_counts(tmp_path):
    run = write_run(tmp_path, steps=3)
    run.append("metrics.jsonl", {"kind": "step", "step": 2, "metrics": metrics(2, 0.05) | {"critic/score/mean": 9.0}})
    assert list(run.by_step("metrics.jsonl", "step")) == [1, 2, 3]
    (read,) = read_runs([run.path])
    assert [read.steps[step]["critic/score/mean"] for step in (1, 2, 3)] == [0.1, 9.0, pytest.approx(0.3)]


def test_evidence_is_checked_anew(tmp_path):
    run = write_run(tmp_path, steps=3)
    assert [row[1].good for row in checks(read_runs([run.path])).rows] == [True] * 4
    run.append("evidence.jsonl", {"kind": "base", "when": "end", "disk": BASE, "actor": ["x"], "rollout": []})
    run.append("evidence.jsonl", {"kind": "adapter", "step": 4, "sent": "s", "actual": [{"adapter_digest": "other"}]})
    run.append("evidence.jsonl", {"kind": "noise", "step": 3, "sigma_target": 0.1, "sigma_measured": 0.3, "modules": 5,
                                  "sigma_interval": [0.09, 0.11], "changed_outside": 2})  # fmt: skip
    run.append("evidence.jsonl", {"kind": "clean", "weights_digest": "x", "clean_digest": "x"})
    (read,) = read_runs([run.path])
    table = checks([read])
    assert [row[1].good for row in table.rows] == [False] * 4
    assert "2 weights changed that should be clean" in table.rows[2][1].text
    assert [row[4].good for row in noise_table(read).rows] == [None, True, True, False]


def test_slices_of_tensor_parallel_ranks_are_no_difference(tmp_path):
    run = write_run(tmp_path)
    ranks = [{"base_digest": rank, "slices": {"a": [0, 1, 0, 1]}, "weights_equal_base": None} for rank in "xy"]
    run.append("evidence.jsonl", {"kind": "base", "when": "end", "disk": BASE, "actor": [BASE], "rollout": ranks})
    cell = checks(read_runs([run.path])).rows[0][1]
    assert cell.good
    assert "the rollout's ranks have slices" in cell.text


def test_sqnr_belongs_to_the_base_by_digest(tmp_path):
    run = write_run(tmp_path)
    ((base,), unknown) = bases(read_runs([run.path]))
    assert unknown == []
    assert base.chart
    assert [series.name for series in base.chart.series] == [
        "q_proj", "down_proj", "shared_experts down_proj", "experts up_proj",
    ]  # fmt: skip
    assert base.table.rows[-1][0].text == "model.layers.1.mlp.experts.*.up_proj"
    file = run.path / QUANTIZATION
    file.write_text(file.read_text().replace(BASE, "another"))
    assert bases(read_runs([run.path]))[0] == []
    assert "no quantization.json of this base" in page_of(run.path).text
    # The file beside the packed checkpoint is used, too: older versions did not copy it to the run.
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / QUANTIZATION).write_text(file.read_text().replace("another", BASE))
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("not there", str(packed)))
    assert len(bases(read_runs([run.path]))[0]) == 1
    dense = open_run(tmp_path / "dense", {})
    dense.append("evidence.jsonl", {"kind": "base", "when": "start", "quantised": False})
    dense.close()
    assert "its base is unquantised (16-bit)" in page_of(dense.path).text


def test_the_file_name_is_that_of_the_quantiser():
    from verl_aqn.checkpoints.error_report import FILE

    assert FILE == QUANTIZATION


def test_every_second_is_counted_once(tmp_path):
    folder = write_run(tmp_path)
    for seconds in (3.0, 2.0):  # if a step was run twice, the later record counts
        folder.append("events.jsonl", {"kind": "checkpoint", "step": 4, "bytes": 1, "seconds": seconds})
    (run,), table, chart = times(read_runs([folder.path]))
    seconds = {name: mean for name, mean, _, _ in run.parts}
    assert seconds == {
        "generation": 7.0,  # scoring again runs within it
        "rescoring without noise": 1.0,
        "old log-probs": 4.0,
        "actor update": 7.0,
        "checkpoint": 0.5,
        "adapter sync to the rollout": 0.5,
        "rest of the step": pytest.approx(0.5),
    }
    assert run.total == 82
    assert chart is not None
    assert len(table.rows) == 7
    assert {*NESTED, *NESTED.values(), *OUTSIDE} <= PHASES.keys()


def test_answers_are_the_same_in_every_report_and_shared_lines_are_said_once(tmp_path):
    answers = {f"system\nBe brief.\nuser\n{n} + 1?\nassistant\n": (str(n + 1), "?", False) for n in range(50)}
    runs = [write_run(tmp_path / str(seed), seed=seed, answers=answers).path for seed in (0, 1)]
    found = [read_answers(read_runs([path]), 10) for path in runs]
    assert [item.prompt for item in found[0].items] == [item.prompt for item in found[1].items]
    assert (found[0].before, found[0].after, found[0].total) == ("system\nBe brief.\nuser\n", "assistant\n", 50)
    assert [name for name, _ in found[0].columns] == ["after step 0", "after step 4"]
    assert all(re.fullmatch(r"\d+ \+ 1\?\n", item.prompt) for item in found[0].items)
    assert read_answers(read_runs(runs), 0).items == []


def test_charts_place_zeros_below_a_logarithmic_axis_and_leave_gaps():
    series = Series("one", [(1, 0.0), (2, 0.1), (3, None), (4, 0.001), (5, 0.01)], 0)
    chart = Chart("key", "title", [series], (0, 5), log=True)
    assert [text for _, text in chart.y_ticks] == ["0.001", "0.01", "0.1", "0"]
    tops = [at for at, _ in chart.y_ticks]
    assert tops[3] == 100
    assert tops[2] < tops[1] < tops[0] < 90
    assert re.sub(r"[\d. ]+", "", chart.line(series)) == "MMML"
    assert chart.values(series) == ["0", "0.1", "–", "0.001", "0.01"]
    assert chart.summary == "one: 0 at step 1, 0.01 at 5; minimum 0 at 1, maximum 0.1 at 2."
    flat = Chart("key", "title", [Series("one", [(3, 2.0)], 0)], (0, 0))
    assert flat.dots(flat.series[0]) == "M50.00 50.00h0"
    assert [number(value) for value in (0.60421, 29, 12345, 1.25e-5, -3e7, 0)] == [
        "0.6042", "29", "12,345", "1.25e-5", "-3e7", "0",
    ]  # fmt: skip


def test_command_takes_a_base_folder_and_overwrites_nothing(tmp_path):
    write_run(tmp_path / "base")
    write_run(tmp_path / "other", seed=1)
    page = tmp_path / "page.html"
    done, again = run_all(["report", tmp_path / "base", "-o", page], ["report", tmp_path / "other", "-o", page])
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{page}: 1 run, 0\.\d MB\n", done.stdout)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {page} exists and is not overwritten: remove it, or give another file with -o\n"
    assert "seed 0" in page.read_text()
    assert "seed 1" not in page.read_text()


def test_mistakes_are_one_line(tmp_path):
    run = write_run(tmp_path / "base")
    with pytest.raises(DataError, match="contains no run"):
        write_report([tmp_path], tmp_path / "page.html")
    with pytest.raises(ConfigError, match="is not a folder"):
        write_report([run.path], tmp_path / "missing" / "page.html")
    with pytest.raises(ConfigError, match="is given twice"):
        write_report([run.path, tmp_path / "base"], tmp_path / "page.html")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match=r"metrics.jsonl line \d+ is damaged"):
        write_report([run.path], tmp_path / "page.html")
    (run.path / "metrics.jsonl").unlink()
    for name, content in (("config.yaml", "a: ["), ("versions.json", "{")):
        whole = (run.path / name).read_text()
        (run.path / name).write_text(content)
        with pytest.raises(DataError, match=f"{run.path / name} is damaged"):
            write_report([run.path], tmp_path / "page.html")
        (run.path / name).write_text(whole)
    assert not (tmp_path / "page.html").exists()


def test_a_copy_of_a_run_without_its_metrics_gives_a_page(tmp_path):
    run = write_run(tmp_path)
    run.append("events.jsonl", {"kind": "checkpoint", "step": 4, "bytes": 1, "seconds": 2.0})
    (run.path / "metrics.jsonl").unlink()
    assert "No step was recorded." in page_of(run.path).text


def test_a_copy_of_a_running_run_without_its_lock_gives_a_page(tmp_path):
    run = write_run(tmp_path, status=None)
    (run.path / "lock").unlink()
    assert "dead" in page_of(run.path).text


def test_imports_neither_torch_nor_verl(tmp_path):
    run = write_run(tmp_path)
    code = (
        "import sys, pathlib; from verl_aqn.runs.report.page import write_report; "
        f"write_report([pathlib.Path({str(run.path)!r})], pathlib.Path({str(tmp_path / 'page.html')!r})); "
        "print(sorted({'torch', 'verl', 'vllm', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_run_keeps_what_rounding_did_to_its_base(tmp_path):
    from verl_aqn.config.compose import load_recipe
    from verl_aqn.launch.train import Prepared, launch

    data = tmp_path / "rows.parquet"
    data.write_bytes(b"rows")
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / QUANTIZATION).write_text("{}")
    overrides = [f"data.train_files={data}", f"data.val_files={data}", f"actor_rollout_ref.model.path={packed}"]
    config = load_recipe("e12", ["profile=cpu", *overrides])
    run = open_run(tmp_path / "base", {})
    launch(run, Prepared(config=config, steps=29, rows={}, source=packed))
    assert (run.path / QUANTIZATION).read_text() == "{}"
    run.close()
    (packed / QUANTIZATION).unlink()
    other = open_run(tmp_path / "other", {})
    launch(other, Prepared(config=config, steps=29, rows={}, source=packed))
    assert not (other.path / QUANTIZATION).exists()
    other.close()
