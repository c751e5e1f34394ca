"""Rows that a run leaves out and answers that never come, in a run of its own: told, counted and on record."""

import pytest

from tests.integration.conftest import finish, lines
from verl_aqn.data.parquet import write_parquet
from verl_aqn.data.word_problems import SOURCE, problems, prompt, row

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
    if extra_info["index"] in (2, 3):
        raise ValueError(f"no opinion on row {extra_info['index'] // 4}\\nnor on others")
    return {"score": len(set(solution_str)) - 40.0, "acc": extra_info["index"] == 0}
"""


@pytest.fixture
def files(tmp_path):
    """Six validation problems: two whose reward raises, one that is too long; of the training rows one is too long."""
    for split in ("train", "test"):
        rows = []
        for number, one in enumerate(problems(6, split, 0)):
            text = one.question if number != 5 else "word " * 2000
            # Of the training rows none has a number that the reward stumbles over.
            index = number if split == "test" else 100 + number
            rows.append(
                row(SOURCE, prompt(text), one.truth, split=split, index=index, question=text, answer=one.answer)
            )
        write_parquet(rows, tmp_path / f"{split}.parquet")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def test_what_is_missing_is_told_before_and_after(train, files):
    process = train(
        files / "run", f"data.train_files={files}/train.parquet", f"data.val_files={files}/test.parquet",
        f"reward.custom_reward_function.path={files}/reward.py", "trainer.total_training_steps=1",
        "trainer.save_freq=-1", "aqn.noise.enabled=false", "algorithm.filter_groups.enable=false",
        "data.val_max_samples=-1",
        "data.train_max_samples=-1", recipe="e6a",
    )  # fmt: skip
    run, said = finish(process, files / "run")
    events = lines(run / "events.jsonl")
    held = {one["set"]: (one["files"], one["kept"], one["too_long"], one["failed"]) for one in events
            if one["kind"] == "rows"}  # fmt: skip
    assert held == {"train": (6, 5, 1, 0), "val": (6, 5, 1, 0)}
    assert "validation data: 6 rows, 1 too long (row 5: 2," in said
    for step, record in zip((0, 1), lines(run / "metrics.jsonl", "validation"), strict=True):
        assert record["step"] == step
        assert (record["items"], record["answered"], record["failed"], record["accuracy"]) == (5, 3, 2, 1 / 5)
        warning = f"validation after step {step}: 2 of 5 answers failed and count as wrong: ValueError: no opinion on"
        assert warning in " ".join(said.split())
        assert "row 0 (2 times)" in " ".join(said.split())
    assert [one["metrics"]["aqn/answers_failed"] for one in lines(run / "metrics.jsonl", "step")] == [0]
    failed = lines(run / "failures.jsonl")
    assert {(one["set"], one["step"], one["reason"]) for one in failed} == {
        ("val", step, "ValueError: no opinion on row 0") for step in (0, 1)
    }
    assert len(failed) == 4
