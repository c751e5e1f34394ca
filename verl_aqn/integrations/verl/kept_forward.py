"""One forward for the log-probs of a step and for its update, where both are of the same tokens and weights.

verl computes the log-probs of a batch, and then, if the batch is one mini-batch of one epoch, the same log-probs again
for the update. This mixin keeps the graph of the first forward until the update. The update uses the graph only if its
log-probs are exactly those that the trainer gives as `old_log_probs` for exactly the same tokens; otherwise the update
computes its own forward. `verl_aqn.preflight.prepare.tell_workers` decides whether a recipe has such batches.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.utils.padding import response_from_nested

KEPT = "update_keeps_forward"
"""Setting in the model's override_config: the update may use the forward of the log-probs."""

MORE = {
    "entropy": "calculate_entropy",
    "sum_pi_squared": "calculate_sum_pi_squared",
    "distillation_losses": "distillation_use_topk",
}
"""Outputs besides log-probs → the setting with which verl asks for them."""


class Kept(NamedTuple):
    """A forward with its graph: the tokens it is of, and what `prepare_model_outputs` made of it."""

    tokens: Tensor
    output: dict[str, Tensor]


class KeptForward:
    """A mixin of verl's FSDP engine that can use one forward for log-probs and update.

    `used_forwards`: the number of updates that used a kept forward.
    """

    used_forwards = 0
    adapter_is_off = False
    _kept: Kept | None = None
    _keeping = False
    _live: dict[str, Tensor] | None = None
    _rows = 0  # of the batch that is computed

    def forward_backward_batch(self: Any, data: Any, loss_function: Callable | None, forward_only: bool = False):
        """Compute as verl does, and note the size of the batch, of which `forward_step` sees only parts."""
        self._rows = len(data)
        return super().forward_backward_batch(data, loss_function, forward_only)  # type: ignore[misc]

    def forward_step(self: Any, micro_batch: Any, loss_function: Callable | None, forward_only: bool):
        """Compute as verl does, but keep the graph of log-probs, and use it in the update of the same tokens."""
        step = super().forward_step  # type: ignore[misc]
        if forward_only and self.adapter_is_off:  # the reference policy
            return step(micro_batch, loss_function, forward_only)
        kept, self._kept = self._kept, None
        if forward_only:
            del kept
            if loss_function is not None or not self._keeps(micro_batch):
                return step(micro_batch, loss_function, forward_only)
            self._keeping = True
            try:
                with torch.enable_grad():
                    result = step(micro_batch, loss_function, forward_only)
            finally:
                self._keeping, live, self._live = False, self._live, None
            self._kept = Kept(micro_batch["input_ids"], live) if live else None
            return result
        wanted = ["log_probs", *(name for name, key in MORE.items() if tu.get_non_tensor_data(micro_batch, key, False))]
        if kept is None or not fits(kept, micro_batch, wanted):
            del kept
            return step(micro_batch, loss_function, forward_only)
        self.used_forwards += 1
        output = {name: kept.output[name] for name in wanted}
        dtype = getattr(self, "_autocast_dtype", torch.bfloat16)
        with nullcontext() if dtype == torch.float32 else torch.autocast(get_device_name(), dtype=dtype):
            loss, metrics = loss_function(  # type: ignore[misc]
                model_output=output, data=micro_batch.to(get_device_id()), dp_group=self.get_data_parallel_group()
            )
        detached = {name: tensor.detach() for name, tensor in output.items()}
        return loss, {"model_output": detached, "loss": loss.detach().item(), "metrics": metrics}

    def noted(self, result: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a forward gave, and note it if its graph is to be kept, because verl returns it without."""
        if self._keeping:
            self._live = result
        return result

    def _keeps(self: Any, micro_batch: Any) -> bool:
        """Return whether a micro-batch of log-probs is a whole batch that the update will take as a whole too."""
        if not self.model_config.override_config.get(KEPT) or _ranks() > 1:
            return False  # several ranks would have to agree
        if is_random_in_training(self.model_config.hf_config):
            return False
        tokens = int(micro_batch["input_ids"].offsets()[-1])
        return len(micro_batch) == self._rows and tokens <= (self.engine_config.max_token_len_per_gpu or 0)


def fits(kept: Kept, micro_batch: Any, wanted: list[str]) -> bool:
    """Return whether a kept forward has what is `wanted` for exactly the tokens and old log-probs of a micro-batch."""
    same = _same(kept.tokens, micro_batch["input_ids"]) and kept.output.keys() >= set(wanted)
    old = micro_batch.get("old_log_probs", None)
    if not same or old is None:
        return False
    return _same(response_from_nested(kept.output["log_probs"].detach(), micro_batch["response_mask"]), old)


def is_random_in_training(config: Any) -> bool:
    """Return whether a model's config has dropout or jitter, which its forward has in training only."""
    told = config.get_text_config().to_dict().items()
    return any(("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0 for key, value in told)


def _same(one: Any, other: Any) -> bool:
    """Return whether two jagged tensors are equal."""
    return torch.equal(one.offsets(), other.offsets()) and torch.equal(one.values(), other.values())


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
