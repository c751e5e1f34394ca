"""A layout that computes each prompt once for all of its samples.

The samples of a GRPO group share their prompt. In short tasks most tokens are prompt tokens. In this layout one row
holds every prompt once and every response once, without padding. The position ids of each response continue those of
the prompt. Layers that process tokens separately run on this row. Attention gathers sequences from the row (`Block`):
each prompt once, and for each sample its prompt and its response.
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
    """B sequences whose attention is computed together, padded at the end to S tokens with R queries.

    `keys` [B, S] and `queries` [B, R]: indices into the row of the tokens of a sequence, and of its queries. `first`
    [B]: the position of the first query in a sequence. `lengths` [B]: the number of tokens. `real`: indices in [B * R]
    of the queries that are not padding.
    """

    keys: Tensor
    queries: Tensor
    first: Tensor
    lengths: Tensor
    real: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """The positions [B, R] of the queries in their sequences."""
        return self.first.unsqueeze(1) + torch.arange(self.queries.shape[1], device=self.first.device)

    @cached_property
    def real_keys(self) -> Tensor:
        """The queries of `real` as indices in [B * S], for attention with all tokens of a sequence as queries."""
        sequence, number = self.real // self.queries.shape[1], self.real % self.queries.shape[1]
        return sequence * self.keys.shape[1] + self.first[sequence] + number


@dataclass(frozen=True)
class SharedPrompts:
    """One row of L tokens for N response tokens of B samples.

    `input_ids`, `position_ids`: int64 [1, L]. `blocks`: the sequences for attention. `order` [L]: the index of each
    token's output among the real queries of all blocks. For each response token, in order of samples: `column` [N] is
    the index of the token that predicts it, `label` [N] its id, `flat` [N] the index of its log-prob in a jagged layout
    of prompt + response per sample, and `sample` [N] the index of its sample. The last token of a response predicts
    nothing and is not in the row.
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
    """Lay out B samples (1-D int64 tensors, prompts not empty) so that equal prompts occur only once."""
    device = prompts[0].device
    prompts, responses = [p.cpu() for p in prompts], [r.cpu() for r in responses]
    groups: dict[tuple[int, ...], list[int]] = {}
    for sample, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt.tolist()), []).append(sample)
    starts = torch.tensor([0, *(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))]).cumsum(0)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    whole: list[tuple[Tensor, int]] = []  # indices of a prompt, and the position of its first query
    continued: list[tuple[Tensor, int]] = []  # indices of a prompt and a response, and the position of the first query
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
    query_rows = torch.cat([block.queries.flatten()[block.real] for block in blocks])
    found = [torch.cat(parts).to(device) for parts in zip(*places, strict=True)]
    row, place_in = (torch.cat(parts).unsqueeze(0).to(device) for parts in (ids, positions))
    moved = tuple(Block(*(t.to(device) for t in (b.keys, b.queries, b.first, b.lengths, b.real))) for b in blocks)
    return SharedPrompts(row, place_in, moved, query_rows.argsort().to(device), *found)


def _blocks(sequences: list[tuple[Tensor, int]]) -> Iterator[Block]:
    """Yield blocks of sequences (indices, first query) of similar length, the longest first."""
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
