"""Generation of responses to a few prompts in plain transformers, without an inference engine."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from verl_aqn.models.layouts import decide

Choose = Callable[[Tensor, list[tuple[int, int]], int], Tensor]
"""(logits [R, V], (prompt, sample) of each row, number of the token) → the chosen tokens, int64 [R, 1]."""


def greedy(logits: Tensor, rows: list[tuple[int, int]], number: int) -> Tensor:
    """Choose the most likely token of each row."""
    return logits.argmax(-1, keepdim=True)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    choose: Choose,
    ends: set[int],
    tokens: int,
    samples: int = 1,
    together: int = 64,
) -> list[list[list[int]]]:
    """Generate responses [prompt][sample] of at most `tokens` tokens.

    Each token of `ends` (the EOS token ids) ends a response and is part of it. The common prefix of all prompts is
    computed once, and each prompt once for all of its samples. About `together` responses are generated at a time, in
    batches of prompts of similar length. Models with recurrent layers, or with attention windows shorter than the rows,
    get batches of prompts of equal length, and each sample is computed separately, because their caches cannot be
    shared or padded.
    """
    if not prefixes(model, max(map(len, prompts)) + tokens):
        return _plainly(model, prompts, choose, ends, tokens, samples, together)
    answers: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in prompts]
    shared = shared_length(prompts)
    for batch in batches(prompts, max(1, together // samples)):
        suffixes = [prompts[i][shared:] for i in batch]
        longest = max(map(len, suffixes))
        pads = [longest - len(suffix) for suffix in suffixes]

        def tensor(rows: list[list[int]]) -> Tensor:
            return torch.tensor(rows, device=model.device)

        step = tensor([[0] * pad + suffix for pad, suffix in zip(pads, suffixes, strict=True)])
        # The padding is between the shared prefix and the rest; no token attends to it.
        mask = tensor([[1] * shared + [0] * pad + [1] * (longest - pad) for pad in pads])
        places = (shared + torch.arange(longest, device=model.device) - tensor([[pad] for pad in pads])).clamp(min=0)
        rows = [(i, j) for i in batch for j in range(samples)]  # the responses that have not ended
        cache = prefix(model, prompts[0][:shared], len(batch))
        for number in range(tokens):
            logits = model(
                input_ids=step, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            places = places[:, -1:] + 1
            if number == 0:
                cache.batch_repeat_interleave(samples)
                logits, mask, places = (x.repeat_interleave(samples, 0) for x in (logits, mask, places))
            step = choose(logits, rows, number)
            for (i, j), token in zip(rows, step[:, 0].tolist(), strict=True):
                answers[i][j].append(token)
            on = [k for k, (i, j) in enumerate(rows) if answers[i][j][-1] not in ends]
            if not on:
                break
            if len(on) < len(rows):
                index = torch.tensor(on, device=model.device)
                cache.batch_select_indices(index)
                step, mask, places = step[index], mask[index], places[index]
                rows = [rows[k] for k in on]
            mask = F.pad(mask, (0, 1), value=1)
    return answers


def _plainly(
    model: PreTrainedModel, prompts: Sequence[list[int]], choose: Choose, ends: set[int], tokens: int, samples: int,
    together: int,
) -> list[list[list[int]]]:  # fmt: skip
    """Generate as `generate` does, but without a shared prefix, without padding and without cutting the cache."""
    answers: list[list[list[int]]] = [[[] for _ in range(samples)] for _ in prompts]
    for length in sorted(set(map(len, prompts))):
        same = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(same), max(1, together // samples)):
            rows = [(i, j) for i in same[start : start + max(1, together // samples)] for j in range(samples)]
            step = torch.tensor([prompts[i] for i, _ in rows], device=model.device)
            cache = DynamicCache(config=model.config)
            ended: set[tuple[int, int]] = set()
            for number in range(tokens):
                logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1]
                step = choose(logits, rows, number)
                for row, token in zip(rows, step[:, 0].tolist(), strict=True):
                    if row not in ended:
                        answers[row[0]][row[1]].append(token)
                    if token in ends:
                        ended.add(row)
                if len(ended) == len(rows):
                    break
    return answers


def prefixes(model: PreTrainedModel, length: int) -> bool:
    """Return whether rows of up to `length` tokens can share the cache of a prefix, with padding after the prefix.

    For a PEFT model the base decides, because adapters act on each token separately.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layout = decide(base)
    return layout is not None and layout.full(length)


def shared_length(prompts: Sequence[list[int]]) -> int:
    """Return the length of the common prefix of all prompts; at least one token of each prompt is not part of it."""
    shortest = min(map(len, prompts))
    differ = (i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    return min(shortest - 1, next(differ, shortest))


def batches(prompts: Sequence[list[int]], together: int) -> Iterator[list[int]]:
    """Yield the indices of prompts in batches of `together` prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), together):
        yield order[start : start + together]


def prefix(model: PreTrainedModel, ids: list[int], copies: int) -> DynamicCache:
    """Return the cache of tokens `ids` for a batch of `copies`; `ids` may be empty."""
    cache = DynamicCache(config=model.config)
    if ids:
        model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(copies)
    return cache
