"""Save the batch for which a gradient was not finite, so that the cause can be investigated."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
import transfer_queue
from safetensors.torch import save_file

from verl_aqn.errors import TrainingError
from verl_aqn.integrations.verl.root_cause import root_cause
from verl_aqn.runs.folder import RunFolder


@contextmanager
def saved_where_it_diverges(batch: Any, folder: RunFolder, step: int) -> Iterator[None]:
    """Save the step's batch to FOLDER/diverged-<step>.safetensors if the update inside raises a TrainingError.

    A field with samples of different lengths becomes two tensors: `<field>` [all tokens] and `<field>.offsets` [n + 1].
    The file's metadata has `keys`, the keys of the samples in order.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = root_cause(error)
        if not isinstance(cause, TrainingError):
            raise
        file = folder.path / f"diverged-{step}.safetensors"
        data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in data.items():
            if isinstance(value, torch.Tensor):
                tensors |= {name: value} if not value.is_nested else _flat(name, value)
        save_file(tensors, file, metadata={"keys": json.dumps(list(batch.keys))})
        raise TrainingError(f"step {step}: {cause} (its batch: {file})") from error


def _flat(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = value.unbind()
    ends = torch.tensor([0, *(part.shape[0] for part in parts)]).cumsum(0)
    return {name: torch.cat(parts).contiguous(), f"{name}.offsets": ends}
