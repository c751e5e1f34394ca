"""A prompt computed once for its samples gives the log-probs of separate rows."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from verl_aqn.verl_api.shared_prompt import share_prompts


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def separate(model, prompts, responses):
    """Log-probs of every response token, each sample in a row of its own, jagged layout [prompt + response]."""
    out = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.cat([prompt, response])
        logp = torch.log_softmax(model(ids.unsqueeze(0)).logits[0], -1)
        row = torch.zeros(len(ids))
        for j, token in enumerate(response):
            row[len(prompt) + j - 1] = logp[len(prompt) + j - 1, token]
        out.append(row)
    return torch.cat(out)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 0, 5, 1, 4, 2]])
def test_log_probs_and_gradients_equal_those_of_separate_rows(model, order):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(97, (n,), generator=generator) for n in (5, 9))
    lengths = [4, 1, 7, 3, 6, 2]
    answers = [torch.randint(97, (n,), generator=generator) for n in lengths]
    samples = list(zip([a, a, a, b, b, a], answers, strict=True))
    prompts, responses = map(list, zip(*(samples[i] for i in order), strict=True))

    shared = share_prompts(prompts, responses)
    assert shared.input_ids.shape[0] == 2
    output = model(
        input_ids=shared.input_ids,
        position_ids=shared.position_ids,
        attention_mask=shared.mask,
        logits_to_keep=shared.input_ids.shape[1] - shared.first_column,
    )
    logits = output.logits[shared.row, shared.column - shared.first_column]
    chosen = torch.log_softmax(logits, -1).gather(1, shared.label.unsqueeze(1)).squeeze(1)
    got = torch.zeros(sum(map(len, prompts + responses))).index_put((shared.flat,), chosen)
    want = separate(model, prompts, responses)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)

    weight = model.model.layers[0].self_attn.q_proj.weight
    (got_grad,) = torch.autograd.grad(got.sum(), weight)
    (want_grad,) = torch.autograd.grad(want.sum(), weight)
    torch.testing.assert_close(got_grad, want_grad, atol=1e-4, rtol=1e-3)


def test_a_response_does_not_see_its_sibling(model):
    prompt = torch.tensor([1, 2, 3])
    first = share_prompts([prompt, prompt], [torch.tensor([4, 5]), torch.tensor([6, 7])])
    second = share_prompts([prompt, prompt], [torch.tensor([9, 9]), torch.tensor([6, 7])])
    last = [
        model(input_ids=s.input_ids, position_ids=s.position_ids, attention_mask=s.mask).logits[0, -1]
        for s in (first, second)
    ]
    torch.testing.assert_close(*last)
