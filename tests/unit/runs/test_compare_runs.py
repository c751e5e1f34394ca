"""Runs that `verl-aqn compare` reads: how they become arms, what is rejected, table and JSON."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.run_folders import validated_run
from verl_aqn.cli.main import compare as command
from verl_aqn.errors import ConfigError, DataError
from verl_aqn.runs.stats.arms import arms, read_run
from verl_aqn.runs.stats.compare import compare
from verl_aqn.runs.stats.crossed import spread


@pytest.fixture
def experiment(tmp_path):
    """Two seeds without noise and two with noise; each run has its responses in a different order."""
    rng = np.random.default_rng(15)
    control, treated = rng.random((2, 200)) < 0.6, rng.random((2, 200)) < 0.7
    folders = {}
    for arm, table, enabled in (("control", control, False), ("noisy", treated, True)):
        for seed, right in enumerate(table):
            order = np.random.default_rng(seed + 2 * enabled).permutation(200)
            prompts = [f"{number:03d} + 1?" for number in order]
            name = f"{arm}{seed}"
            folders[name] = validated_run(
                tmp_path / name, name, right[order], seed=seed, prompts=prompts, enabled=enabled
            )
    return folders, treated, control


def test_runs_are_grouped_and_items_paired_by_prompt(experiment):
    folders, treated, control = experiment
    found = arms([folders[name] for name in ("control0", "noisy1", "noisy0", "control1")])
    assert [[run.seed for run in arm.runs] for arm in found] == [[0, 1], [1, 0]]
    assert np.array_equal(found[0].scores, control)
    assert np.array_equal(found[1].scores, treated[::-1])


def test_a_base_folder_is_its_newest_run(tmp_path):
    _, newest = (validated_run(tmp_path, name, [1, 0]) for name in ("first", "second"))
    assert read_run(tmp_path).path == newest


def test_json_is_one_document(experiment, capsys):
    folders, treated, control = experiment
    command([folders[name] for name in ("control0", "control1", "noisy0", "noisy1")], None, False, True)
    report = json.loads(capsys.readouterr().out)
    assert report["items"] == 200
    assert report["control"]["seeds"] == [0, 1]
    (arm,) = report["arms"]
    assert arm["difference"] == pytest.approx(treated.mean() - control.mean())
    assert arm["differs"] == {"aqn.noise.enabled": [False, True]}
    assert arm["p_value"] == pytest.approx(spread(treated, control).p_value)
    for key in ("interval", "simultaneous"):
        low, high = arm[key]
        assert low < arm["difference"] < high
    assert report["metric"] == "accuracy"
    assert not {"bootstrap", "detectable", "seeds_needed"} & arm.keys()


def test_table_and_sentence(experiment, capsys):
    folders, *_ = experiment
    command([folders["control0"], folders["noisy0"]], None, False, False)
    text = capsys.readouterr().out
    assert "Last validation, 200 items that all were asked" in text
    assert "noisy0 against control0: not enough data." in text
    assert "What differs: aqn.noise.enabled False → True." in text


def test_runs_whose_code_is_not_known_are_not_taken_for_the_same_without_a_word(experiment, capsys):
    folders, *_ = experiment
    pair = [folders["control0"], folders["noisy0"]]
    known = {"commit": "1f2e", "dirty": False}
    for code, count in ((known, 0), ({"commit": None, "dirty": None}, 2), (known | {"dirty": True}, 2)):
        for folder in pair:
            (folder / "versions.json").write_text(json.dumps(code))
        command(pair, None, False, False)
        text = capsys.readouterr().out
        said = (
            "It cannot be checked that these runs had the same code: 2 of 2 have no commit on record, or had changes "
        )
        assert (said in text) is bool(count)
        assert compare(arms(pair)).to_dict()["unknown_code"] == count


def test_more_than_the_factor_is_refused_unless_named(tmp_path):
    one = validated_run(tmp_path / "a", "a", [1, 0, 1], enabled=False)
    rate = {"actor_rollout_ref": {"actor": {"optim": {"lr": 1e-4}}}}
    two = validated_run(tmp_path / "b", "b", [1, 1, 1], config=rate)
    with pytest.raises(
        ConfigError, match=r"more than aqn.noise: actor_rollout_ref.actor.optim.lr. .*--factor KEY.*--any"
    ):
        arms([one, two])
    assert len(arms([one, two], any_difference=True)) == 2
    assert len(arms([one, two], ["aqn.noise", "actor_rollout_ref.actor.optim"])) == 2
    with pytest.raises(ConfigError, match=r"factor aqn\.nois: these runs have no key"):
        arms([one, two], ["aqn.nois"])
    (two / "versions.json").write_text(json.dumps({"torch": "2.12.0"}))
    with pytest.raises(ConfigError, match=r"versions.torch"):
        arms([one, two], ["aqn.noise", "actor_rollout_ref"])


def test_what_noise_in_the_actor_copies_into_the_config_belongs_to_the_noise(tmp_path):
    one = validated_run(tmp_path / "a", "a", [1, 0], apply_to="rollout", config={"actor_rollout_ref": {"model": {}}})
    copied = {"actor_rollout_ref": {"model": {"override_config": {"noise_in_actor": True}}}}
    two = validated_run(tmp_path / "b", "b", [1, 0], apply_to="rollout+actor", config=copied)
    assert len(arms([one, two])) == 2


def test_a_searched_sigma_is_no_difference_but_how_far_it_falls_is(tmp_path):
    kl = {"target_kl": 0.1}
    runs = [
        validated_run(tmp_path / "a", "a", [1, 0], seed=0, sigma_start=0.05, sigma_end=1e-5, **kl),
        validated_run(tmp_path / "b", "b", [1, 0], seed=1, sigma_start=0.04, sigma_end=8e-6, **kl),
        validated_run(tmp_path / "c", "c", [1, 0], seed=0, sigma_start=0.05, sigma_end=5e-4, **kl),
    ]
    assert [len(arm.runs) for arm in arms(runs)] == [2, 1]


@pytest.mark.parametrize("acc", [None, 0.5, -1.0, "1", float("nan"), 2])
def test_an_answer_of_which_it_is_not_on_record_whether_it_is_right_is_refused_by_name(tmp_path, acc):
    runs = [
        validated_run(tmp_path / "a", "a", [1, 0, 1, 0], enabled=False),
        validated_run(tmp_path / "b", "b", [1, 1, 0, 1]),
    ]
    assert arms(runs)[1].scores.tolist() == [[1, 1, 0, 1]]
    file = runs[1] / "validation/29.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"acc": bool(line["acc"])}) + "\n" for line in lines))
    assert arms(runs)[1].scores.tolist() == [[1, 1, 0, 1]], "as a bool"
    lines[2]["acc"] = acc
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"29\.jsonl has acc=.* for 1 of 4 responses.*the record does not") as caught:
        arms(runs)
    assert "\n" not in str(caught.value)
    del lines[2]["acc"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="has no 'acc' in a line"):
        arms(runs)


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_an_unfinished_run_is_refused(tmp_path, status):
    with pytest.raises(DataError, match=f"is {status}: only finished runs can be compared"):
        read_run(validated_run(tmp_path, "a", [1, 0], status=status))


def test_what_is_no_run_or_has_no_answers_is_refused(tmp_path):
    with pytest.raises(DataError, match="contains no run"):
        read_run(tmp_path)
    folder = validated_run(tmp_path, "a", [1, 0])
    (folder / "validation/29.jsonl").unlink()
    with pytest.raises(DataError, match=r"no validation responses \(validation/29.jsonl\)"):
        read_run(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="no validation responses"):
        read_run(folder)


@pytest.mark.parametrize(("file", "text"), [("config.yaml", "a: ["), ("config.yaml", "5"), ("versions.json", "{")])
def test_a_damaged_record_is_named(tmp_path, file, text):
    folder = validated_run(tmp_path, "a", [1, 0])
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=f"{file} is damaged") as error:
        read_run(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_items_and_repeated_prompts_are_refused(tmp_path):
    one = validated_run(tmp_path / "a", "a", [1, 0, 1], enabled=False)
    two = validated_run(tmp_path / "b", "b", [1, 0, 1], prompts=["0 + 1?", "1 + 1?", "another"])
    with pytest.raises(DataError, match="differ in 2 items"):
        arms([one, two])
    with pytest.raises(DataError, match="3 responses to 2 problems"):
        read_run(validated_run(tmp_path / "c", "c", [1, 0, 1], prompts=["x", "x", "y"]))


def test_one_run_twice_is_told_so(tmp_path):
    folder = validated_run(tmp_path, "a", [1, 0])
    with pytest.raises(ConfigError, match=f"{folder} is given twice: remove one of them"):
        arms([folder, tmp_path])


def test_one_seed_twice_and_one_arm_alone_are_refused(tmp_path):
    runs = [validated_run(tmp_path / name, name, [1, 0], seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    with pytest.raises(DataError, match="the same config and the same seed"):
        arms(runs)
    with pytest.raises(ConfigError, match="all with the same config"):
        arms(runs[1:])


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    one = validated_run(tmp_path / "a", "a", [1, 0])
    for other, code in ((tmp_path, 1), (validated_run(tmp_path / "b", "b", [1, 0], seed=1), 2)):
        result = subprocess.run(
            [sys.executable, "-m", "verl_aqn.cli", "compare", str(one), str(other)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert result.stderr.startswith("error: ")
