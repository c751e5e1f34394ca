"""How far two runs gave the same responses, according to their records."""

import json

import pytest

from verl_aqn.runs import samples
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats.agreement import agreement, main, table


def run(path, steps, validations=None):
    """Write a run with digests `steps` {step: {answer: digest}} and `validations` {step: {(item, sample): text}}."""
    path.mkdir()
    folder = RunFolder(path)
    for step, answers in steps.items():
        folder.append("samples.jsonl", {"kind": "samples", "step": step, "answers": answers})
    (path / "validation").mkdir()
    for step, texts in (validations or {}).items():
        folder.append("metrics.jsonl", {"kind": "validation", "step": step, "accuracy": 0.5})
        lines = [{"item": item, "sample": sample, "output": text} for (item, sample), text in texts.items()]
        (path / "validation" / f"{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_answers_are_compared_by_name_and_one_that_only_one_run_has_is_not_equal(tmp_path):
    first = run(tmp_path / "a", {1: {"5_0_0": "x", "5_1_0": "y"}, 2: {"6_0_0": "x"}})
    second = run(tmp_path / "b", {1: {"5_1_0": "y", "5_0_0": "z"}, 2: {"7_0_0": "x"}, 3: {"8_0_0": "x"}})
    one, two = agreement(first, second)
    assert (one.part, one.step, one.answers, one.common, one.equal, one.share) == ("train", 1, 2, 2, 1, 0.5)
    assert (two.step, two.answers, two.common, two.equal, two.share) == (2, 2, 0, 0, 0.0)


def test_a_step_that_was_repeated_counts_as_it_was_at_last(tmp_path):
    first = run(tmp_path / "a", {1: {"5_0_0": "old"}})
    first.append("samples.jsonl", {"kind": "samples", "step": 1, "answers": {"5_0_0": "new"}})
    (one,) = agreement(first, run(tmp_path / "b", {1: {"5_0_0": "new"}}))
    assert one.share == 1


def test_a_step_of_many_answers_is_several_records_and_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "ANSWERS", 3)
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    old, new = ({f"{n}_0_0": f"{word}{n}" for n in range(7)} for word in ("old", "new"))
    written = samples.sample_records(1, "d", old), samples.sample_records(1, "e", new)
    assert [[len(record["answers"]) for record in records] for records in written] == [[3, 3, 1]] * 2
    assert {(record["count"], record["parts"]) for records in written for record in records} == {(7, 3)}
    folder.append(samples.FILE, *written[0])
    assert samples.samples_of(folder) == {1: old}
    folder.append(samples.FILE, *written[1][:2])  # killed before the third
    assert samples.samples_of(folder) == {}
    folder.append(samples.FILE, *written[1])
    folder.append(samples.FILE, *samples.sample_records(2, "e", {}))
    assert samples.samples_of(folder) == {1: new, 2: {}}


def test_validations_are_compared_by_item_and_sample(tmp_path, capsys):
    texts = {(0, 0): "a", (0, 1): "b", (1, 0): "b", (1, 1): "c"}
    first = run(tmp_path / "a", {1: {"5_0_0": "x"}}, {0: texts})
    second = run(tmp_path / "b", {1: {"5_0_0": "x"}}, {0: texts | {(1, 0): "a"}})
    _, one = agreement(first, second)
    assert (one.part, one.step, one.answers, one.equal, one.accuracies) == ("val", 0, 4, 3, (0.5, 0.5))
    assert table([one]).splitlines()[1].split() == ["val", "0", "4", "4", "3", "75.0%", "50.0%", "and", "50.0%"]
    assert main(str(first.path), str(second.path)) == 0
    assert "75.0%" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [{}, {2: {"5_0_0": "x"}}])
def test_runs_that_cannot_be_compared_are_refused_in_a_line(tmp_path, steps, capsys):
    first, second = run(tmp_path / "a", {1: {"5_0_0": "x"}}), run(tmp_path / "b", steps)
    assert main(str(first.path), str(second.path)) == 1
    assert ("no digests of its samples" if not steps else "no step in common") in capsys.readouterr().err
    assert main("one") == 1
