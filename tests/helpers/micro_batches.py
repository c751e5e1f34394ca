"""Micro-batches as verl's trainer makes them, and an engine that computes them without FSDP."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from tensordict import TensorDict
from torch import nn
from verl.utils import tensordict_utils as tu

from tests.helpers.engines import bare_engine
from tests.helpers.sharing_models import V
from verl_aqn.integrations.verl.engine import AqnFSDPEngine


def engine_of(model: nn.Module, remove_padding: bool = False) -> AqnFSDPEngine:
    """Return an engine as it is after building `model`, without adapters and FSDP."""
    engine = bare_engine(AqnFSDPEngine, "", {})
    engine.use_remove_padding, engine.use_ulysses_sp, engine.pad_to_length = remove_padding, False, False
    engine.engine_config = SimpleNamespace(forward_only=False, seed=0, entropy_checkpointing=False)
    engine._decide_layout(model, share=True)
    engine.module = model
    return engine


def jagged(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return rows of different lengths as one nested tensor."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def batch(prompts: list[torch.Tensor], responses: list[torch.Tensor], remove_padding: bool = False) -> TensorDict:
    """Return a micro-batch as verl's trainer makes it."""
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    made = TensorDict(
        {
            "input_ids": jagged(whole),
            "position_ids": jagged([torch.arange(len(row)) for row in whole]),
            "prompts": jagged(prompts),
            "responses": jagged(responses),
        },
        batch_size=[len(prompts)],
    )
    tu.assign_non_tensor(made, use_remove_padding=remove_padding, temperature=1.0, pad_token_id=0)
    tu.assign_non_tensor(made, multi_modal_inputs=[{} for _ in prompts])  # as verl's agent loop gives it
    return made


def samples() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return mixed groups of 3, 2 and 1; prompts shorter and longer than a window; responses of 1 to 13 tokens."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randint(3, V, (n,), generator=generator) for n in (4, 17, 9))
    prompts = [b, a, a, c, b, a]
    return prompts, [torch.randint(3, V, (n,), generator=generator) for n in (5, 1, 9, 3, 13, 2)]
