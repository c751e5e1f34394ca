"""Reproducible prompts, requests and batches: two runs with the same seed get the same samples.

In verl, prompts have random UUIDs, requests have no seed, and a batch is in the order in which responses arrived. Here
each request has its own seed (`verl_aqn.runs.request_seeds`), and a batch is in the order of its keys. If groups are
filtered, the first groups in the order of the data are used, also if more were requested.
"""

from collections import deque
from typing import Any

import ray
import transfer_queue
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils import tensordict_utils
from verl.utils.dataset.rl_dataset import collate_fn

from verl_aqn.config.schema import parse_aqn
from verl_aqn.integrations.verl.checkpointing import SavingTrainer
from verl_aqn.integrations.verl.failures import NotingFailures
from verl_aqn.runs.request_seeds import PROMPT, StepPrompts, digest_of, place_of, request_seed
from verl_aqn.runs.samples import FILE, sample_records

_Worker: Any = AgentLoopWorkerTQ.__ray_actor_class__  # the class without Ray's wrapper


class _SeededWorker(_Worker):
    """Runs the sessions of a batch; each request has a seed from its step, prompt and sample."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.aqn = parse_aqn(self.config)

    async def _run_agent_loop(self, sampling_params, trajectory, *args, **kwargs):
        prompt = kwargs.pop(PROMPT)
        if self.aqn.request_seeds:
            part = "val" if trajectory["validate"] else "train"
            seed = request_seed(self.aqn.seed, part, int(trajectory["step"]), prompt, kwargs["session_id"])
            sampling_params = sampling_params | {"seed": seed}
        return await super()._run_agent_loop(sampling_params, trajectory, *args, **kwargs)


class AqnAgentLoopWorker(NotingFailures, _SeededWorker):
    """The worker with seeds, which also records failed sessions."""


class AqnAgentLoopManager(AgentLoopManagerTQ):
    """Passes batches to `AqnAgentLoopWorker`, and remembers the data row of each (random) uid of a validation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(AqnAgentLoopWorker)
        self.row_of: dict[str, int] = {}

    def generate_sequences(self, prompts):
        if "validate" in prompts:
            self.row_of |= {uid: int(row) for uid, row in zip(prompts["uid"], prompts[PROMPT], strict=True)}
        super().generate_sequences(prompts)


def number_rows(dataset: Any) -> None:
    """Add the column PROMPT, with the number of the row, to each item of a map-style `dataset`.

    verl's items do not have their row number, and verl's loader keeps the object that it was given. Therefore this
    function changes the class of that object.
    """
    cls = type(dataset)
    if hasattr(cls, PROMPT):
        return

    def item_with_row(self, item):
        return cls.__getitem__(self, item) | {PROMPT: str(int(item))}

    dataset.__class__ = type(cls.__name__, (cls,), {"__getitem__": item_with_row, PROMPT: True})


class KeyedTrainer(SavingTrainer):
    """verl's trainer with names for prompts that are the same in two runs with one seed."""

    def __init__(self, config):
        super().__init__(config)
        self.prompts = StepPrompts()

    def _init_dataloader(self):
        super()._init_dataloader()
        for dataset in (self.train_dataset, self.val_dataset):
            number_rows(dataset)

    def _fetch_one_gen_batch(self):
        if self.put_back:
            row = self.put_back.popleft()
            batch = tensordict_utils.get_tensordict(collate_fn([self.train_dataset[row]]))
        else:
            batch = super()._fetch_one_gen_batch()
        names = [self.prompts.name(self.global_steps, int(row)) for row in batch[PROMPT]]
        for column, values in zip((PROMPT, "uid"), zip(*names, strict=True), strict=True):
            tensordict_utils.assign_non_tensor_stack(batch, column, list(values))
        return batch

    def on_sample_end(self):
        buffer = self.replay_buffer
        if self.config.algorithm.filter_groups.enable:
            # The number of requested prompts depends on the order in which responses arrived. To keep the data order
            # the same in every run, the prompts after the last used one are taken again in the next step. verl discards
            # their responses too.
            self.put_back = deque([*self.prompts.after(place_of(buffer.selected[-1])), *self.put_back])
        keys = buffer.taken.keys
        data = transfer_queue.kv_batch_get(keys=keys, partition_id="train", select_fields=["responses"])
        tokens = [response.tolist() for response in data["responses"].unbind()]
        digest, answers = digest_of(dict(zip(keys, tokens, strict=True)))
        self.folder.append(FILE, *sample_records(self.global_steps, digest, answers))
        super().on_sample_end()
