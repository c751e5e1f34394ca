"""The answers of a validation as verl hands them to be written, and what becomes of them on record."""

import json

import pytest
from omegaconf import OmegaConf

from verl_aqn.errors import ConfigError
from verl_aqn.runs.folder import RunFolder


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """verl's trainer with its own writer, in front of answers that are already there: `trainer.answers`."""
    from verl.trainer.ppo.v1 import trainer_sync

    from verl_aqn.verl_api.trainer import AqnTrainer

    made = AqnTrainer.__new__(AqnTrainer)
    rollout = {"rollout": {"val_kwargs": {"n": 1}}}
    made.config = OmegaConf.create(
        {"trainer": {"validation_data_dir": str(tmp_path / "validation")}, "actor_rollout_ref": rollout}
    )
    made.folder, made.global_steps, made.shares = RunFolder(tmp_path), 29, {}

    def validate(self):
        outputs, truths, more = self.answers
        self.val_dataset = truths
        self._init_dump_executor()
        self._dump_generations(
            inputs=[str(n) for n in range(len(outputs))], outputs=outputs, gts=truths, scores=[0.0] * len(outputs),
            dump_path=self.config.trainer.validation_data_dir,
            reward_extra_infos_dict={"uid": [f"u{n}_0_0" for n in range(len(outputs))]} | more,
        )  # fmt: skip
        self._shutdown_dump_executor()
        return {"val-core/task/acc/mean@1": 1.0, "val-core/other task/acc/mean@1": 0.0}

    monkeypatch.setattr(trainer_sync.PPOTrainerSync, "_validate", validate)
    return made


def test_three_scores_by_item_and_in_the_record(trainer):
    outputs = ["#### 72", "\\boxed{72}", "72 or 7", "#### 72\n#### none"]
    trainer.answers = outputs, ["72"] * 4, {"acc": [1.0, 0.0, 0.0, 0.0], "flexible": [1.0, 1.0, 0.0, 1.0]}
    metrics = trainer._validate()
    items = [json.loads(line) for line in (trainer.folder.path / "validation/29.jsonl").read_text().splitlines()]
    assert [item["math_verify"] for item in items] == [1.0, 1.0, 0.0, 1.0]
    assert [item["output"] for item in items] == outputs
    (record,) = trainer.folder.read("metrics.jsonl")
    shares = {"accuracy": 0.25, "flexible": 0.75, "math_verify": 0.75}
    assert record == {"kind": "validation", "step": 29, **shares, "items": 4, "answered": 4, "failed": 0}
    assert {f"aqn/validation/{name}": share for name, share in shares.items()}.items() <= metrics.items()


def test_truths_that_are_no_numbers_and_a_reward_with_one_rule_have_no_other_columns(trainer):
    trainer.answers = ["a", "b"], ["a", "72"], {"acc": [1.0, 0.0]}
    trainer._validate()
    (record,) = trainer.folder.read("metrics.jsonl")
    assert record == {"kind": "validation", "step": 29, "accuracy": 0.5, "items": 2, "answered": 2, "failed": 0}


def test_the_accuracy_is_of_all_problems_whatever_their_source_or_where_an_answer_is_missing(trainer, monkeypatch):
    """verl's own figures are of each data source; an answer that never came leaves no line."""
    trainer.answers = ["#### 1", "#### 2", "#### 3"], ["1", "2", "3"], {"acc": [1.0, 0, True]}
    dump = type(trainer)._dump_generations

    def with_one_more(self, **given):
        self.val_dataset = [*self.val_dataset, "4"]
        dump(self, **given)

    monkeypatch.setattr(type(trainer), "_dump_generations", with_one_more)
    trainer._validate()
    (record,) = trainer.folder.read("metrics.jsonl")
    counts = {"items": 4, "answered": 3, "failed": 1}
    assert record == {"kind": "validation", "step": 29, "accuracy": 0.5, "math_verify": 0.75, **counts}
    (warning,) = trainer.folder.read("events.jsonl")
    assert warning["kind"] == "warning"
    assert "validation after step 29: 1 of 4 answers failed and count as wrong: training.log" in warning["text"]


def test_a_reward_that_tells_no_accuracy_is_refused_in_a_line(trainer):
    trainer.answers = ["#### 1"], ["1"], {"reward": [0.3]}
    with pytest.raises(ConfigError, match=r"reward\.custom_reward_function tells no accuracy"):
        trainer._validate()


@pytest.mark.parametrize("column", ["acc", "flexible"])
@pytest.mark.parametrize("value", [None, -1.0, 0.5, float("nan"), "1", 2])
def test_a_reward_whose_accuracy_is_neither_0_nor_1_is_refused_with_what_to_return(trainer, column, value):
    trainer.answers = ["#### 1", "#### 2"], ["1", "2"], {"acc": [1.0, 0.0], "flexible": [1, 1]} | {column: [1.0, value]}
    with pytest.raises(ConfigError, match=rf"{column}=.* for 1 of 2 answers.*'acc': 1 if the answer is right else 0"):
        trainer._validate()
    assert not list(trainer.folder.read("metrics.jsonl"))


def test_truths_may_be_numbers_of_any_type(trainer):
    trainer.answers = ["#### 72", "#### 0.5", "#### 7"], [72, 0.5, "7"], {"acc": [1, 1, 0]}
    trainer._validate()
    (record,) = trainer.folder.read("metrics.jsonl")
    assert record["math_verify"] == 1.0


def test_training_answers_are_not_judged(trainer, tmp_path):
    trainer._init_dump_executor()
    trainer._dump_generations(["q"], ["#### 72"], ["72"], [1.0], {}, str(tmp_path / "rollouts"))
    trainer._shutdown_dump_executor()
    assert "math_verify" not in (tmp_path / "rollouts/29.jsonl").read_text()
