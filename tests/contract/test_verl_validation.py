"""The responses of a validation as verl passes them to its writer, and the records that are made of them."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from verl_aqn.errors import ConfigError, ProcessFault, RewardError
from verl_aqn.runs.folder import RunFolder


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """verl's trainer with its own writer and responses that already exist: `trainer.answers`."""
    from verl.trainer.ppo.v1 import trainer_sync

    from verl_aqn.integrations.verl.trainer import AqnTrainer

    made = AqnTrainer.__new__(AqnTrainer)
    made.config = OmegaConf.create(
        {
            "trainer": {"validation_data_dir": str(tmp_path / "validation")},
            "actor_rollout_ref": {"rollout": {"val_kwargs": {"n": 1}}},
            "aqn": {"run": {"allow_failed": 0.9}},
        }
    )
    made.folder, made.global_steps, made.keys = RunFolder(tmp_path), 29, None

    def validate(self):
        outputs, truths, more = self.answers
        if self.keys is None:  # one response per problem
            self.val_dataset, self.keys = truths, [f"uid-{n}_0_0" for n in range(len(outputs))]
        uids = dict.fromkeys(key.split("_")[0] for key in self.keys)
        self.agent_loop_manager = SimpleNamespace(row_of={uid: int(uid.split("-")[1]) for uid in uids})
        self._init_dump_executor()
        self._dump_generations(
            inputs=[str(n) for n in range(len(outputs))], outputs=outputs, gts=truths, scores=[0.0] * len(outputs),
            reward_extra_infos_dict=more | {"uid": self.keys},
            dump_path=self.config.trainer.validation_data_dir,
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
    sizes = {"items": 4, "samples": 1, "pass_at": {"1": 0.25}, "answered": 4, "failed": 0}
    assert record == {"kind": "validation", "step": 29, **shares, **sizes}
    assert {f"aqn/validation/{name}": share for name, share in shares.items()}.items() <= metrics.items()


def test_truths_that_are_no_numbers_and_a_reward_with_one_rule_have_no_other_columns(trainer):
    trainer.answers = ["a", "b"], ["a", "72"], {"acc": [1.0, 0.0]}
    trainer._validate()
    (record,) = trainer.folder.read("metrics.jsonl")
    assert record == {
        "kind": "validation",
        "step": 29,
        "accuracy": 0.5,
        "items": 2,
        "samples": 1,
        "answered": 2,
        "failed": 0,
        "pass_at": {"1": 0.5},
    }


def test_shares_by_data_source_where_there_are_several(trainer, capsys):
    from verl_aqn.launch.console import source_table

    kinds = ["sums", "words", "sums"]
    trainer.val_dataset = [{"data_source": kind} for kind in kinds]
    trainer.keys = ["uid-0_0_0", "uid-2_0_0"]  # the response to this prompt never arrived
    trainer.answers = ["#### 1", "#### 2"], ["1", "3"], {"acc": [1.0, 0.0]}
    trainer._validate()
    (record,) = (one for one in trainer.folder.read("metrics.jsonl") if one["kind"] == "validation")
    assert record["by_source"]["sums"] == {"items": 2, "accuracy": 0.5, "math_verify": 0.5}
    assert record["by_source"]["words"] == {"items": 1, "accuracy": 0.0, "math_verify": 0.0}
    assert record["accuracy"] == pytest.approx(1 / 3)
    table = source_table(trainer.folder)
    assert list(table.columns[0].cells) == ["sums", "words"]
    assert list(table.columns[1].cells) == ["50.00", "0.00"]


def several(trainer, problems, keys, acc):
    """Return responses to `problems`, two for each, in the order of arrival."""
    trainer.config.actor_rollout_ref.rollout.val_kwargs.n = 2
    trainer.val_dataset, trainer.keys = list(range(problems)), keys
    trainer.answers = [f"answer {key}" for key in keys], ["–"] * len(keys), {"acc": acc}
    trainer._validate()
    (record,) = trainer.folder.read("metrics.jsonl")
    return record, list(trainer.folder.read("validation/29.jsonl"))


def test_several_answers_are_by_item_and_sample_in_order_and_scored_as_avg_and_pass(trainer):
    keys = ["uid-2_1_0", "uid-0_1_0", "uid-1_0_0", "uid-0_0_0", "uid-2_0_0", "uid-1_1_0"]
    record, lines = several(trainer, 3, keys, [0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    assert [(line["item"], line["sample"]) for line in lines] == [(item, s) for item in range(3) for s in range(2)]
    assert [line["output"] for line in lines] == [f"answer uid-{item}_{s}_0" for item in range(3) for s in range(2)]
    assert [line["acc"] for line in lines] == [0, 1, 1, 1, 0, 0]
    assert not any("uid" in line for line in lines)
    sizes = {
        "items": 3,
        "samples": 2,
        "answered": 6,
        "failed": 0,
        "pass_at": {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)},
    }
    assert record == {"kind": "validation", "step": 29, "accuracy": 0.5, **sizes}


def test_a_session_of_several_outputs_is_one_answer_the_last(trainer):
    keys = ["uid-0_0_0", "uid-0_0_10", "uid-0_0_9", "uid-0_1_0"]
    record, lines = several(trainer, 1, keys, [1.0, 1.0, 1.0, 0.0])
    assert [line["output"] for line in lines] == ["answer uid-0_0_10", "answer uid-0_1_0"]
    assert (record["accuracy"], record["pass_at"]) == (0.5, {"1": 0.5, "2": 1.0})


def test_a_missing_answer_is_wrong_and_told(trainer):
    record, lines = several(trainer, 2, ["uid-1_1_0", "uid-0_0_0", "uid-0_1_0"], [1.0, 1.0, 1.0])
    assert (len(lines), record["accuracy"], record["items"]) == (3, 0.75, 2)
    assert record["pass_at"] == {"1": 0.75, "2": 1.0}
    (warning,) = trainer.folder.read("events.jsonl")
    assert warning["text"] == (
        "validation after step 29: 1 of 4 responses failed; see training.log for the reason; they count as wrong"
    )
    assert (record["answered"], record["failed"]) == (3, 1)


@pytest.mark.parametrize(("allowed", "stops"), [(0.0, True), (0.24, True), (0.25, False)])
def test_a_missing_answer_stops_a_run_that_does_not_allow_for_it(trainer, allowed, stops):
    trainer.config.aqn.run.allow_failed = allowed
    arguments = trainer, 2, ["uid-1_1_0", "uid-0_0_0", "uid-0_1_0"], [1.0, 1.0, 1.0]
    if stops:
        with pytest.raises(ProcessFault, match=r"1 of 4 responses failed.*aqn\.run\.allow_failed"):
            several(*arguments)
        assert not list(trainer.folder.read("metrics.jsonl"))
    else:
        several(*arguments)


def test_answers_of_a_step_count_against_those_asked_for(trainer):
    trainer.config.data, trainer.config.actor_rollout_ref.rollout.n = {"train_batch_size": 2}, 4
    trainer.config.aqn.run.allow_failed = 0.1
    record = {"set": "train", "step": 29, "attempt": 1, "uid": "29-0-3", "session": 1, "item": 3, "prompt": "How?"}
    trainer.refuse_failed("train")
    trainer.folder.append("failures.jsonl", record | {"stage": "reward", "reason": "/r.py:3: KeyError: 'a'"})
    with pytest.raises(RewardError, match=r"step 29: 1 of 8 .*: the reward of training item 3 \('How\?'\): /r"):
        trainer.refuse_failed("train")
    trainer.requested = 16  # including groups that replace discarded ones
    trainer.refuse_failed("train")
    trainer.refuse_failed("train", missing=1)
    with pytest.raises(RewardError, match="2 of 16"):
        trainer.refuse_failed("train", missing=2)


def test_problems_of_which_no_answer_came_count(trainer):
    record, _ = several(trainer, 4, ["uid-3_0_0", "uid-3_1_0"], [1.0, 0.0])
    assert (record["accuracy"], record["pass_at"]) == (0.125, {"1": 0.125, "2": 0.25})


def test_a_reward_that_tells_no_accuracy_is_refused_in_a_line(trainer):
    trainer.answers = ["#### 1"], ["1"], {"reward": [0.3]}
    with pytest.raises(ConfigError, match=r"reward\.custom_reward_function returns no accuracy"):
        trainer._validate()


@pytest.mark.parametrize("column", ["acc", "flexible"])
@pytest.mark.parametrize("value", [None, -1.0, 0.5, float("nan"), "1", 2])
def test_a_reward_whose_accuracy_is_neither_0_nor_1_is_refused_with_what_to_return(trainer, column, value):
    trainer.answers = ["#### 1", "#### 2"], ["1", "2"], {"acc": [1.0, 0.0], "flexible": [1, 1]} | {column: [1.0, value]}
    with pytest.raises(ConfigError, match=rf"{column}=.* for 1 of 2 responses.*'acc': 1 if the answer is right else 0"):
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
