"""One forward over a prompt for all of its samples.

The samples of a GRPO group share their prompt, which on short tasks is most of the tokens. Here a row holds the prompt
once and the group's responses behind it; a mask keeps the responses from seeing each other, and position ids count on
from the prompt in each. The log-probs are those of separate rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrompts:
    """G rows of at most L tokens for T response tokens of B samples.

    `input_ids`, `position_ids` [G, L] int64; `mask` [G, 1, L, L] bool, True where a query (row) sees a key (column).
    For each response token in order of samples: `row`, `column` [T] of the token that predicts it, `label` [T] its id,
    `flat` [T] where its log-prob belongs in a jagged layout of prompt + response per sample, `sample` [T].
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    label: Tensor
    flat: Tensor
    sample: Tensor

    @property
    def first_column(self) -> int:
        """No column before this one predicts a response token."""
        return int(self.column.min())


def share_prompts(prompts: list[Tensor], responses: list[Tensor]) -> SharedPrompts:
    """Lay B samples (1-D int64 tensors, prompts not empty) out so that equal prompts stand once."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for sample, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt.tolist()), []).append(sample)
    lengths = [len(key) + sum(len(responses[i]) for i in members) for key, members in groups.items()]
    device, size = prompts[0].device, max(lengths)
    input_ids = torch.zeros(len(groups), size, dtype=torch.int64)
    position_ids = torch.zeros(len(groups), size, dtype=torch.int64)
    segment = torch.full((len(groups), size), -1)  # 0 the prompt, 1… the samples, -1 padding
    starts = torch.tensor([0, *(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))]).cumsum(0)
    places: list[tuple[Tensor, ...]] = [()] * len(prompts)
    for row, (key, members) in enumerate(groups.items()):
        start = len(key)
        input_ids[row, :start] = torch.tensor(key)
        position_ids[row, :start] = torch.arange(start)
        segment[row, :start] = 0
        for number, sample in enumerate(members, 1):
            response = responses[sample].cpu()
            end = start + len(response)
            input_ids[row, start:end] = response
            position_ids[row, start:end] = torch.arange(len(key), len(key) + len(response))
            segment[row, start:end] = number
            column = torch.arange(start - 1, end - 1)
            column[:1] = len(key) - 1  # the first token of each response follows the prompt
            flat = starts[sample] + len(key) - 1 + torch.arange(len(response))
            places[sample] = (torch.full_like(column, row), column, response, flat, torch.full_like(column, sample))
            start = end
    query, key_segment = segment.unsqueeze(2), segment.unsqueeze(1)
    order = torch.arange(size)
    mask = (order.unsqueeze(1) >= order) & ((key_segment == 0) | (key_segment == query))
    found = [torch.cat(parts).to(device) for parts in zip(*places, strict=True)]
    return SharedPrompts(input_ids.to(device), position_ids.to(device), mask.unsqueeze(1).to(device), *found)
