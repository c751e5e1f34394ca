"""Validation responses by problem: several per problem, equal problems, and records of older versions."""

import json

import pytest

from tests.helpers.run_folders import line, lines_of, validated_run, write_lines
from verl_aqn.errors import ConfigError, DataError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats.arms import arms, read_run
from verl_aqn.runs.stats.compare import compare
from verl_aqn.runs.stats.intervals import score_interval, validation_text, wilson
from verl_aqn.runs.stats.passk import pass_at_k
from verl_aqn.runs.stats.scores import Item, answers_in
from verl_aqn.runs.stats.verdict import compare_validations


def test_several_answers_are_counted_by_problem():
    found = answers_in(lines_of([[1, 0, 1, 1], [0, 0, 0, 0]]))
    assert (found.right, found.samples) == ({Item("0 + 1?", "1"): 3, Item("1 + 1?", "1"): 0}, 4)
    assert list(found.scores().values()) == [0.75, 0.0]
    assert list(found.scores("pass@2").values()) == [pass_at_k(3, 4, 2), 0.0]
    assert found.metrics == ["avg", "pass@1", "pass@2", "pass@4"]
    with pytest.raises(ConfigError, match="pass@8 needs 8 responses to each problem, but there are 4"):
        found.scores("pass@8")
    for metric in ("pass@0", "pass@", "maj@4", "avg@4"):
        with pytest.raises(ConfigError, match="neither avg nor pass@K"):
            found.scores(metric)


def test_problems_that_are_alike_are_told_apart_in_the_order_of_the_data():
    found = answers_in(lines_of([[1, 1], [0, 0], [0, 1]], ["twice", "once", "twice"]))
    assert found.right == {Item("once", "1"): 0, Item("twice", "1"): 2, Item("twice", "1", 1): 1}


def test_records_of_older_versions_are_one_answer_each_and_pair_with_new_ones():
    old, new = answers_in([line("a", 1.0), line("b", False)]), answers_in([line("b", True, 0, 0), line("a", 0, 7, 0)])
    assert old.right.keys() == new.right.keys()
    assert (old.samples, list(old.right.values())) == (1, [1, 0])


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line("a", 1), line("a", 0)],  # old: which is which?
        [line("a", 1, 0, 0), line("a", 0, 0, 0)],  # one sample twice
        [*lines_of([[1, 0], [1, 0]]), line("x", 1, 2, 0)],  # a problem with fewer answers
    ],
)
def test_answers_that_cannot_be_told_apart_are_refused(lines):
    with pytest.raises(DataError, match="each problem needs the same number of responses"):
        answers_in(lines)


@pytest.mark.parametrize("acc", [-1, 0.5, "1", 2, None, float("nan")])
def test_what_is_neither_right_nor_wrong_is_refused(acc):
    with pytest.raises(DataError, match=r"^has acc=.* for 1 of 1 responses, which is neither 0 nor 1"):
        answers_in([line("a", acc)])


def test_an_answer_that_never_came_is_wrong_where_the_record_tells_how_many_there_should_be():
    lines = lines_of([[1, 1, 1, 0], [0, 1, 1, 1]])
    del lines[2]  # of problem 0 the second
    found = answers_in(lines, record={"samples": 4})
    assert (list(found.right.values()), found.samples) == ([2, 3], 4)
    with pytest.raises(DataError, match="same number"):
        answers_in(lines)
    with pytest.raises(DataError, match="same number"):
        answers_in(lines, record={"samples": 3})
    assert answers_in(lines_of([[1], [0]]), record={"samples": 1}).samples == 1


def silent_run(base, name, right, silent, samples=1, seed=0, noise=True):
    """Return a run with a response to each item of `right`, and none to `silent` further items."""
    folder = validated_run(base, name, right, seed=seed, enabled=noise)
    count, share = len(right) * samples, sum(right) / (len(right) + silent)
    write_lines(folder / "validation/29.jsonl", lines_of([[one] * samples for one in right]))
    told = {"accuracy": share, "items": len(right) + silent, "samples": samples, "answered": count}
    RunFolder(folder).append("metrics.jsonl", {"kind": "validation", "step": 29, **told, "failed": silent * samples})
    return folder


def test_items_of_which_no_response_came_are_wrong():
    record = {"items": 5, "samples": 2, "answered": 4, "accuracy": 0.4}
    found = answers_in(lines_of([[1, 1], [1, 1]]), record=record)
    assert (found.silent, found.items, found.values(), found.values("pass@2")) == (
        3,
        5,
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
    )


@pytest.mark.parametrize("silent", [0, 3])
def test_runs_are_compared_by_all_items_that_they_were_asked(tmp_path, silent):
    """An item that another run answered, or none did, is wrong where no response came."""
    one = silent_run(tmp_path / "a", "a", [1, 1, 1, 0], 3, noise=False)
    two = silent_run(tmp_path / "b", "b", [1] * (7 - silent), silent)
    found = arms([one, two])
    assert [arm.scores.tolist() for arm in found] == [[[1, 1, 1, 0, 0, 0, 0]], [[1] * (7 - silent) + [0] * silent]]
    assert [score.accuracy for score in compare(found).scores] == pytest.approx([3 / 7, 1 - silent / 7])
    other = silent_run(tmp_path / "c", "c", [1] * 7, 1, seed=1)
    with pytest.raises(DataError, match=r"differ in [134] items: all runs must have been asked the same items"):
        arms([two, other, one])


def test_responses_that_are_not_those_of_the_record_are_refused(tmp_path):
    folder = silent_run(tmp_path, "a", [1, 1, 1, 0], 0)
    file = folder / "validation/29.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]))  # cut
    with pytest.raises(DataError, match=r"29\.jsonl has 3 responses, but metrics\.jsonl counts 4"):
        read_run(folder)
    file.write_text("".join([*lines[:3], lines[3].replace('"acc": 0', '"acc": 1')]))
    with pytest.raises(DataError, match=r"has 4 right responses of 4, but metrics\.jsonl says 75\.00 %"):
        read_run(folder)


def test_an_interval_of_right_and_wrong_answers_is_wilsons():
    assert score_interval([1, 0, 1, 1]) == pytest.approx(wilson(3, 4), abs=1e-12)
    assert score_interval([1, 1, 1], samples=8) == wilson(3, 3)
    assert score_interval([0.5] * 10, samples=2) == pytest.approx(wilson(10, 20))  # all alike
    assert score_interval([0.0, 1.0] * 10, samples=8) == pytest.approx(wilson(10, 20))  # a problem's answers agree
    low, high = score_interval([0.25, 0.75] * 10, samples=8)
    assert wilson(80, 160)[0] > low > wilson(10, 20)[0]
    assert high == pytest.approx(1 - low)


def sampled_run(base, name, table, prompts=None, **noise):
    folder = validated_run(base, name, [0] * len(table), **noise)
    for step, answered in ((0, [[0] * len(table[0])] * len(table)), (29, table)):
        write_lines(folder / f"validation/{step}.jsonl", lines_of(answered, prompts))
    return folder


def test_runs_of_several_answers_are_compared_by_avg_or_pass(tmp_path):
    runs = [
        sampled_run(tmp_path / "a", "a", [[1, 0], [0, 0], [1, 1]], ["x", "x", "y"], enabled=False),
        sampled_run(tmp_path / "b", "b", [[1, 1], [0, 1], [1, 1]], ["x", "x", "y"]),
    ]
    found = arms(runs)
    assert [arm.scores.tolist() for arm in found] == [[[0.5, 0.0, 1.0]], [[1.0, 0.5, 1.0]]]
    assert compare(found).metric == "avg@2"
    passed = arms(runs, metric="pass@2")
    assert [arm.scores.tolist() for arm in passed] == [[[1.0, 0.0, 1.0]], [[1.0, 1.0, 1.0]]]
    assert compare(passed).metric == "pass@2"
    with pytest.raises(ConfigError, match=r"a/runs/\S+: pass@4 needs 4 responses"):
        arms(runs, metric="pass@4")
    assert read_run(runs[0]).answers.samples == 2


def test_before_and_after_of_several_answers_is_by_problem(tmp_path):
    folder = sampled_run(tmp_path, "a", [[1, 0], [0, 0], [1, 1]])
    change = compare_validations(RunFolder(folder), 0, 29)
    assert (change.n, change.before, change.after, change.gained, change.lost) == (3, 0.0, 0.5, 2, 0)
    (folder / "validation/29.jsonl").write_text(json.dumps(line("a", 0.5)) + "\n")
    assert compare_validations(RunFolder(folder), 0, 29) is None


def test_a_validation_in_words():
    assert validation_text({"accuracy": 0.75, "items": 4}) == "75.0 % (3 of 4; 95 % interval 30.1–95.4 %)"
    record = {"accuracy": 0.5, "items": 100, "samples": 8, "pass_at": {"1": 0.5, "2": 0.6, "8": 0.8125}}
    assert validation_text(record) == (
        "avg@8 50.0 % (100 problems × 8 responses; 95 % interval at most 40.4–59.6 %), pass@8 81.2 %"
    )
