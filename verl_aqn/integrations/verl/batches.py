"""Access to the samples of a verl batch, which itself holds only their keys."""

from typing import Any

import transfer_queue


def real_keys(batch: Any) -> list[str]:
    """Return the keys of a batch's samples, without padding."""
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def fields_of(batch: Any, names: list[str]) -> Any:
    """Return these fields of a batch's samples as nested tensors, because each sample has its own length."""
    return transfer_queue.kv_batch_get(keys=real_keys(batch), partition_id=batch.partition_id, select_fields=names)
