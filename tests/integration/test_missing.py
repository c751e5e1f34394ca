"""A run that leaves out rows and misses responses: both are reported, counted and recorded."""

import re

import pytest

from tests.integration.conftest import lines, newest
from verl_aqn.tasks.parquet import write_parquet
from verl_aqn.tasks.word_problems import SOURCE, problems, prompt, row

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
    if extra_info["index"] in (2, 3):
        raise ValueError(f"no opinion on row {extra_info['index'] // 4}\\nnor on others")
    return {"score": len(set(solution_str)) - 40.0, "acc": extra_info["index"] == 0}
"""


@pytest.fixture
def files(tmp_path):
    """Six validation problems and the training rows.

    The reward raises for two of the problems, and one is too long; one training row is too long.
    """
    for split in ("train", "test"):
        rows = []
        for number, one in enumerate(problems(6, split, 0)):
            text = one.question if number != 5 else "word " * 2000
            # No training row has a number for which the reward raises.
            index = number if split == "test" else 100 + number
            rows.append(
                row(SOURCE, prompt(text), one.truth, split=split, index=index, question=text, answer=one.answer)
            )
        write_parquet(rows, tmp_path / f"{split}.parquet")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def test_a_failed_answer_stops_a_run_that_may_go_on_and_is_counted(train, files):
    settings = [
        f"data.train_files={files}/train.parquet", f"data.val_files={files}/test.parquet",
        f"reward.custom_reward_function.path={files}/reward.py", "reward.reward_manager.name=remote",
        "trainer.total_training_steps=1", "trainer.save_freq=-1", "aqn.noise.enabled=false",
        "algorithm.filter_groups.enable=false", "data.val_max_samples=-1", "data.train_max_samples=-1",
    ]  # fmt: skip
    process = train(files / "run", *settings, recipe="e6a")
    said = process.communicate(timeout=800)[1]
    assert process.returncode == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(r"validation after step 0: [12] of 5 responses failed: the reward of validation item [23] ", line)
    assert f"{files}/reward.py:4: ValueError: no opinion on row 0" in line
    assert "nor on others" not in line
    assert "aqn.run.allow_failed=0 allows 0" in line
    assert lines(newest(files / "run") / "failures.jsonl")

    # The same run resumes, with a limit that allows all of these failures.
    process = train(files / "run", *settings, "aqn.run.allow_failed=0.4", recipe="e6a")
    result, said = process.communicate(timeout=800)
    run = newest(files / "run")
    assert process.returncode == 0, said + (run / "training.log").read_text()[-3000:]
    assert len(list((files / "run" / "runs").glob("2*"))) == 1
    said, result = " ".join(said.split()), " ".join(result.split())
    counts = {one["set"]: (one["files"], one["kept"], one["too_long"], one["failed"])
            for one in lines(run / "events.jsonl", "rows")}  # fmt: skip
    assert counts == {"train": (6, 5, 1, 0), "val": (6, 5, 1, 0)}
    assert "validation data: 6 rows, 1 too long (row 5: 2," in said
    for step, record in zip((0, 1), lines(run / "metrics.jsonl", "validation"), strict=True):
        assert record["step"] == step
        assert (record["items"], record["answered"], record["failed"], record["accuracy"]) == (5, 3, 2, 1 / 5)
        assert f"validation after step {step}: 2 of 5 responses failed: the reward of validation item" in said
    assert "no opinion on row 0 (2 times); they count as wrong" in said
    assert [one["metrics"]["aqn/answers_failed"] for one in lines(run / "metrics.jsonl", "step")] == [0]
    failed = [one for one in lines(run / "failures.jsonl") if one["attempt"] == 2]
    assert sorted((one["set"], one["step"], one["stage"], one["item"]) for one in failed) == [
        ("val", step, "reward", item) for step in (0, 1) for item in (2, 3)
    ]
    assert "on the same 3 items (2 more have no response in one of the two)" in result
    assert "failed: 0 training responses, which were not trained on, and 4 validation responses" in result
