"""verl's sampler inside ours: what a step learns from depends on the data, not on when responses arrived."""

import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from verl_aqn.errors import ProcessFault, RewardError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.request_seeds import StepPrompts, order_of_key, seed_of

BATCH, ROWS, STEPS = 4, 23, 6


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, item):
        return {"raw_prompt": [{"role": "user", "content": str(item)}], "dummy": torch.zeros(1)}


class Queue:
    """TransferQueue with a rollout whose responses arrive in random order; `flat` prompts have no reward variance."""

    def __init__(self, chance: random.Random):
        self.chance, self.tags, self.requested = chance, {}, []

    def kv_batch_put(self, keys, partition_id, tags):
        self.tags |= dict(zip(keys, tags, strict=True))
        self.requested += keys

    def kv_list(self):
        return {"train": dict(self.tags)}

    def kv_clear(self, keys, partition_id):
        for key in keys:
            del self.tags[key]

    def kv_batch_get(self, keys, partition_id, select_fields):
        (field,) = select_fields
        return {field: Values(self.reward(key) if field == "rm_scores" else self.tokens(key) for key in keys)}

    def tokens(self, key):
        return torch.tensor([seed_of(key) % 100])

    def reward(self, key):
        uid, session, _ = key.split("_")
        step, _, prompt = uid.split("-", 2)
        flat = seed_of(step, prompt) % 3 == 0
        return torch.tensor([0.0 if flat else float(session)])

    def answer(self):
        """Answer some of the pending prompts, session by session in any order."""
        running = [uid for uid, tag in self.tags.items() if tag.get("is_prompt") and tag["status"] != "finished"]
        for uid in self.chance.sample(running, self.chance.randint(0, len(running))):
            self.tags[uid]["status"] = "finished"
            for session in self.chance.sample(range(2), 2):
                self.tags[f"{uid}_{session}_0"] = {"status": "success", "seq_len": 1}
        self.tags = dict(self.chance.sample(list(self.tags.items()), len(self.tags)))


class Values(list):
    def unbind(self):
        return self


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """`trainer(chance, filtering)`: our trainer with a `Queue`, and verl's loader, submission and sampler."""
    from verl.trainer.ppo.v1 import replay_buffer, trainer_base

    from verl_aqn.integrations.verl import groups, keyed

    monkeypatch.setattr(trainer_base, "create_rl_dataset", lambda *args, **kwargs: Rows())

    def make(chance, filtering=True):
        queue = Queue(random.Random(chance))
        monkeypatch.setattr(trainer_base, "tq", queue)
        monkeypatch.setattr(replay_buffer, "tq", queue)
        monkeypatch.setattr(keyed, "transfer_queue", queue)
        made = keyed.KeyedTrainer.__new__(keyed.KeyedTrainer)
        made.config = OmegaConf.create(
            {
                "data": {
                    "train_files": "a", "val_files": "a", "train_batch_size": BATCH, "gen_batch_size": None,
                    "val_batch_size": None, "dataloader_num_workers": 0, "shuffle": True, "seed": 1,
                },
                "trainer": {"total_epochs": 1, "total_training_steps": STEPS, "v1": {"sampler": {}}},
                "algorithm": {"filter_groups": {"enable": filtering}},
                "actor_rollout_ref": {"actor": {"ppo_mini_batch_size": BATCH, "optim": {}}},
            }
        )  # fmt: skip
        made.tokenizer = made.processor = made.train_dataloader_it = None
        made.trainer_mode, made.parameter_sync_step, made.curr_step_profile = "sync", 1, False
        made.prompts, made.put_back, made.queue = StepPrompts(), deque(), queue
        made.folder = RunFolder(tmp_path)
        made.checkpoint_manager = SimpleNamespace(sleep_replicas=lambda: None)
        made.agent_loop_manager = SimpleNamespace(generate_sequences=lambda batch: None)
        made._init_dataloader()
        buffer = replay_buffer.ReplayBuffer(
            trainer_mode="sync", trainer_config=made.config, max_off_policy_threshold=None,
            max_off_policy_strategy="drop", sampler_kwargs={}, refill_fn=made._add_prompts_to_generate,
            filter_groups_metric="reward" if filtering else None, train_batch_size=BATCH, gen_batch_size=1,
            max_inflight_gen_batches=2,
        )  # fmt: skip
        buffer.__class__ = groups.AqnReplayBuffer
        buffer.folder = made.folder
        buffer.begin()
        buffer._wait_for_next_poll = lambda partition_id, since: queue.answer() or since
        made.replay_buffer = buffer
        return made

    return make


def steps_of(made, first=1, last=STEPS):
    """Return the keys of each step's batch."""
    found = []
    for made.global_steps in range(first, last + 1):
        made._add_batch_to_generate()
        batch, _ = made.replay_buffer.sample(made.global_steps, "train", BATCH)
        assert isinstance(batch, KVBatchMeta)
        made.on_sample_end()
        found.append(list(batch.keys))
        made.queue.kv_clear(batch.keys, "train")
    return found


@pytest.mark.parametrize("filtering", [True, False])
def test_batches_are_the_same_whenever_answers_come(trainer, filtering):
    batches, requested = [], set()
    for chance in range(25):
        made = trainer(chance, filtering)
        batches.append(steps_of(made))
        requested.add(tuple(made.queue.requested))
    assert all(batch == batches[0] for batch in batches)
    assert (len(requested) > 1) == filtering, "the chance must show somewhere, or nothing was tested"
    for keys in batches[0]:
        assert len(keys) == 2 * BATCH
        assert keys == sorted(keys, key=order_of_key)
        assert len({key.split("_")[0] for key in keys}) == BATCH
    texts = [{key.split("-")[2].split("_")[0] for key in keys} for keys in batches[0]]
    assert len(set().union(*texts)) > ROWS / 2, "the data is gone through"


def test_digests_of_samples_are_on_record_by_step(trainer):
    made = trainer(0)
    batches = steps_of(made)
    records = list(made.folder.read("samples.jsonl"))
    assert [(record["step"], record["count"]) for record in records] == [(n, 2 * BATCH) for n in range(1, STEPS + 1)]
    assert [list(record["answers"]) for record in records] == [[k.split("-", 2)[2] for k in keys] for keys in batches]
    again = trainer(1)
    steps_of(again)
    assert [record["digest"] for record in again.folder.read("samples.jsonl")][STEPS:] == [r["digest"] for r in records]


def test_a_resumed_run_takes_the_prompts_of_one_that_was_not_stopped(trainer):
    undisturbed = steps_of(trainer(0))
    for chance in range(1, 6):
        made = trainer(chance)
        assert steps_of(made, last=3) == undisturbed[:3]
        place, put_back = made.train_dataloader.state_dict(), list(made.put_back)
        resumed = trainer(chance + 100)
        resumed.train_dataloader.load_state_dict(place)
        resumed.put_back = deque(put_back)
        assert steps_of(resumed, first=4) == undisturbed[3:]


def test_a_step_without_any_answer_says_why(trainer):
    """verl would say that its buffer has no trajectories, and suggest drawing other problems."""
    made = trainer(0, filtering=False)
    queue, failure = made.queue, {"set": "train", "step": 1, "uid": "u", "reason": "ValueError: no such unit"}

    def fail():
        for uid, tag in queue.tags.items():
            tag["status"] = "failure"
            made.folder.append("failures.jsonl", failure | {"uid": uid, "session": 0})

    queue.answer = fail
    with pytest.raises(ProcessFault, match=r"^step 1: all responses to 4 problems failed: .*such unit \(4 times\)$"):
        steps_of(made, last=1)


@pytest.mark.parametrize("partition", ["train", "val"])
def test_a_failed_answer_is_told_while_others_are_still_waited_for(trainer, partition):
    made = trainer(0)

    def stop(failed):
        raise RewardError(failed)

    made.replay_buffer.on_failure = stop
    prompt = {"is_prompt": True, "global_steps": 1}
    tags = {"1-0-3": prompt | {"status": "running"}, "1-1-4": prompt | {"status": "failure"}}
    made.queue.kv_list = lambda: {partition: tags}
    with pytest.raises(RewardError, match=partition):
        made.replay_buffer.sample(1, partition, BATCH)
    tags["1-1-4"]["status"] = "running"
    made.replay_buffer._sync_metadata_from_transfer_queue()
