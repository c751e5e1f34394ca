"""One forward over a prompt for all of its samples.

The samples of a GRPO group share their prompt, which on short tasks is most of the tokens. Here one row holds every
prompt once and every response once, without padding; position ids count on from the prompt in each response. Layers
that work on single tokens see this row. Attention gathers sequences from the row (`Block`): each prompt once, and for
each sample its prompt and its own response.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# A block may be padded to sequences up to 1 / _FILL times as long as its shortest one.
_FILL = 0.75


@dataclass(frozen=True)
class Block:
    """B sequences that attend together, padded to S tokens with R queries; padding stands at the end.

    `keys` [B, S], `queries` [B, R]: the row's slots of a sequence's tokens, and of those that ask. `first` [B]: the
    position of a sequence's first query. `lengths` [B]: its tokens. `real`: queries that are not padding, by number
    in [B * R].
    """

    keys: Tensor
    queries: Tensor
    first: Tensor
    lengths: Tensor
    real: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """Positions of the queries in their sequences, [B, R]."""
        return self.first.unsqueeze(1) + torch.arange(self.queries.shape[1], device=self.first.device)

    @cached_property
    def real_keys(self) -> Tensor:
        """As `real`, by number in [B * S], where all tokens of a sequence are queries."""
        sequence, number = self.real // self.queries.shape[1], self.real % self.queries.shape[1]
        return sequence * self.keys.shape[1] + self.first[sequence] + number


@dataclass(frozen=True)
class SharedPrompts:
    """One row of L tokens for N response tokens of B samples.

    `input_ids`, `position_ids` [1, L] int64; `blocks`: what attends to what; `order` [L]: where the output of each slot
    stands in the real queries of all blocks. For each response token in order of samples: `column` [N] of the token
    that predicts it, `label` [N] its id, `flat` [N] where its log-prob belongs in a jagged layout of prompt + response
    per sample, `sample` [N]. The last token of a response predicts nothing and is left out of the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    blocks: tuple[Block, ...]
    order: Tensor
    column: Tensor
    label: Tensor
    flat: Tensor
    sample: Tensor


def share_prompts(prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> SharedPrompts:
    """Lay B samples (1-D int64 tensors, prompts not empty) out so that equal prompts stand once."""
    device = prompts[0].device
    prompts, responses = [p.cpu() for p in prompts], [r.cpu() for r in responses]
    groups: dict[tuple[int, ...], list[int]] = {}
    for sample, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt.tolist()), []).append(sample)
    starts = torch.tensor([0, *(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))]).cumsum(0)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    whole: list[tuple[Tensor, int]] = []  # slots of a prompt, and its first query
    continued: list[tuple[Tensor, int]] = []  # slots of a prompt and of a response, and its first query
    places: list[tuple[Tensor, ...]] = [()] * len(prompts)
    size = 0

    def place(tokens: Tensor, position: int) -> Tensor:
        nonlocal size
        ids.append(tokens)
        positions.append(torch.arange(position, position + len(tokens)))
        size += len(tokens)
        return torch.arange(size - len(tokens), size)

    for members in groups.values():
        prompt = prompts[members[0]]
        slots = place(prompt, 0)
        whole.append((slots, 0))
        for sample in members:
            response = responses[sample]
            own = place(response[:-1], len(prompt))
            if len(own):
                continued.append((torch.cat([slots, own]), len(prompt)))
            column = torch.cat([slots[-1:], own])[: len(response)]
            flat = starts[sample] + len(prompt) - 1 + torch.arange(len(response))
            places[sample] = (column, response, flat, torch.full_like(column, sample))
    blocks = [*_blocks(whole), *_blocks(continued)]
    asked = torch.cat([block.queries.flatten()[block.real] for block in blocks])
    found = [torch.cat(parts).to(device) for parts in zip(*places, strict=True)]
    row, place_in = (torch.cat(parts).unsqueeze(0).to(device) for parts in (ids, positions))
    moved = tuple(Block(*(t.to(device) for t in (b.keys, b.queries, b.first, b.lengths, b.real))) for b in blocks)
    return SharedPrompts(row, place_in, moved, asked.argsort().to(device), *found)


def _blocks(sequences: list[tuple[Tensor, int]]) -> Iterator[Block]:
    """Sequences (slots, first query) of about one length together, the longest first."""
    todo = sorted(sequences, key=lambda sequence: len(sequence[0]), reverse=True)
    while todo:
        size = len(todo[0][0])
        count = sum(len(slots) >= _FILL * size for slots, _ in todo)
        taken, todo = todo[:count], todo[count:]
        keys = torch.nn.utils.rnn.pad_sequence([slots for slots, _ in taken], batch_first=True)
        asking = [slots[first:] for slots, first in taken]
        queries = torch.nn.utils.rnn.pad_sequence(asking, batch_first=True)
        counts = torch.tensor([len(slots) for slots in asking])
        real = (torch.arange(queries.shape[1]) < counts.unsqueeze(1)).flatten().nonzero().squeeze(1)
        lengths = torch.tensor([len(slots) for slots, _ in taken])
        yield Block(keys, queries, torch.tensor([first for _, first in taken]), lengths, real)
