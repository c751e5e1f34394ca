"""Answers of a model to a few prompts in plain transformers, where an engine would be too much to start."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from verl_aqn.models.layouts import decide

Choose = Callable[[Tensor, list[tuple[int, int]], int], Tensor]
"""(logits [R, V], their rows' (prompt, sample), number of the token) → the tokens taken, int64 [R, 1]."""


def greedy(logits: Tensor, rows: list[tuple[int, int]], number: int) -> Tensor:
    """The likeliest token of each row."""
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
    """Answers [prompt][sample] of at most `tokens` tokens; one of `ends` ends an answer and is part of it.

    What all prompts begin with is computed once, and each prompt once for all of its samples. About `together` answers
    run at a time, those of prompts of about one length. Models with layers that carry a state or see less than all
    tokens get prompts of one length, computed for each sample: their caches cannot be shared, or take no padding.
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
        # Padding stands between the shared beginning and the rest, and nothing looks at it.
        mask = tensor([[1] * shared + [0] * pad + [1] * (longest - pad) for pad in pads])
        places = (shared + torch.arange(longest, device=model.device) - tensor([[pad] for pad in pads])).clamp(min=0)
        rows = [(i, j) for i in batch for j in range(samples)]  # those that go on
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
    """As `generate`, without a part of a prompt that stands once, without padding, without a cache that is cut."""
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
    """Whether a cache of a prompt's beginning can be shared and padded behind, for rows of up to `length` tokens.

    With PEFT's wrapper the base decides: adapters work on single tokens.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layout = decide(base)
    return layout is not None and layout.full(length)


def shared_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; at least one of each prompt is left over."""
    shortest = min(map(len, prompts))
    differ = (i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1)
    return min(shortest - 1, next(differ, shortest))


def batches(prompts: Sequence[list[int]], together: int) -> Iterator[list[int]]:
    """Prompts by number, `together` of about one length at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), together):
        yield order[start : start + together]


def prefix(model: PreTrainedModel, ids: list[int], copies: int) -> DynamicCache:
    """The cache of tokens `ids`, which may be none, for a batch of `copies`."""
    cache = DynamicCache(config=model.config)
    if ids:
        model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(copies)
    return cache
