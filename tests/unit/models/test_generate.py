"""Responses generated in batches equal those of one prompt at a time, with and without shared caches."""

import pytest
import torch

from tests.helpers.sharing_models import SHARING, V, make
from verl_aqn.models.generate import generate, greedy, prefixes
from verl_aqn.models.layouts import attention_of, use_attention

KINDS = (
    "llama", "gemma2", "gemma3", "mistral", "gpt_oss", "llama4 chunks", "qwen3_next", "lfm2", "granite hybrid",
    "falcon_h1", "nemotron_h",
)  # fmt: skip


def one_by_one(model, prompt: list[int], ends: set[int], tokens: int) -> list[int]:
    """Generate greedily, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and not (len(ids) > len(prompt) and ids[-1] in ends):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_answers_are_those_of_one_prompt_at_a_time(kind):
    model = make(kind)
    told = attention_of(model)
    use_attention(model, "eager")  # sdpa would ignore Gemma2's soft cap
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(3, V, (8,), generator=generator).tolist()
    prompts = [start + torch.randint(3, V, (n,), generator=generator).tolist() for n in (2, 5, 5, 9)]
    ends = {one_by_one(model, prompts[0], set(), 3)[2]}  # so that a response ends early
    want = [[one_by_one(model, prompt, ends, 8)] * 2 for prompt in prompts]
    use_attention(model, told)
    assert len({len(answer) for group in want for answer in group}) > 1
    assert generate(model, prompts, greedy, ends, 8, samples=2, together=6) == want


def test_caches_are_shared_only_where_every_layer_sees_all_tokens():
    llama, window = make("llama"), make("mistral")
    assert SHARING["mistral"][1]["sliding_window"] == 6
    assert prefixes(llama, 200)
    assert prefixes(window, 6)
    assert not prefixes(window, 7)
    assert not prefixes(make("lfm2"), 3)
