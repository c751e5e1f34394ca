"""Log-probs and entropies in chunks equal those of all logits, and so do their gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.sharing_models import make
from verl_aqn.models import vocabulary
from verl_aqn.models.vocabulary import Scored, ScoringHead, score, scores_of, token_scores, use_scoring_head

N, H, V = 37, 32, 500


def inputs(dtype: torch.dtype, bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Scored]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    label = torch.randint(0, V, (N,), generator=generator)
    temperature = 0.5 + torch.rand(N, generator=generator)
    return normal(N, H), normal(V, H), normal(V) if bias else None, Scored(label, temperature, entropy=True)


@pytest.mark.parametrize("tokens", [1, 5, N, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_values_and_gradients_of_all_logits(dtype, bias, tokens, monkeypatch):
    monkeypatch.setattr(vocabulary, "BUFFER", 4 * V * tokens)
    hidden, weight, offset, scored = inputs(dtype, bias)
    one, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = token_scores(one, weight, offset, scored)
    expected = scores_of(nn.functional.linear(other, weight, offset), scored)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    slope = torch.randn(N, 2, generator=torch.Generator().manual_seed(1))
    for column in (slope * torch.tensor([1.0, 0.0]), slope):  # log-probs alone, and entropies too
        one.grad = other.grad = None
        found.backward(column, retain_graph=True)
        expected.backward(column, retain_graph=True)
        off = (one.grad - other.grad).float().norm() / other.grad.float().norm()
        assert off < (1e-5 if dtype == torch.float32 else 0.01)


def test_a_certain_token_keeps_a_small_gradient():
    """With p = 1 − 1e-5 the gradient in bf16 is as exact as that of all logits, not the difference of two roundings."""
    weight = torch.zeros(8, H, dtype=torch.bfloat16)
    weight[0], weight[1] = 1.0, -1.0
    hidden = torch.full((1, H), 5.7 / H, dtype=torch.bfloat16, requires_grad=True)
    scored = Scored(torch.tensor([0]))
    token_scores(hidden, weight, None, scored)[:, 0].sum().backward()
    other = hidden.detach().clone().requires_grad_()
    scores_of(nn.functional.linear(other, weight), scored)[:, 0].sum().backward()
    torch.testing.assert_close(hidden.grad, other.grad, rtol=0.02, atol=0)
    assert hidden.grad.abs().max() > 0


class Largest(TorchDispatchMode):
    """Record the elements of the largest tensor that any operator returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_no_tensor_is_of_all_tokens_and_the_vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "BUFFER", 4 * V * 4)
    hidden, weight, _, scored = inputs(torch.float32)
    hidden.requires_grad_()
    with Largest() as largest:
        token_scores(hidden, weight, None, scored).sum().backward()
    assert largest.size == V * H > 4 * V
    with Largest() as all_logits:
        scores_of(hidden @ weight.T, scored).sum().backward()
    assert all_logits.size == N * V


def test_a_head_scores_when_asked_and_gives_logits_otherwise():
    head, (hidden, _, _, scored) = nn.Linear(H, V, bias=False).requires_grad_(False), inputs(torch.float32)
    logits = head(hidden[None])
    head.__class__ = ScoringHead
    torch.testing.assert_close(head(hidden[None]), logits)
    score(scored)
    try:
        torch.testing.assert_close(head(hidden[None])[0], scores_of(logits[0], scored), atol=2e-5, rtol=2e-5)
        with pytest.raises(ValueError, match="36 hidden states for 37 tokens"):
            head(hidden[None, 1:])
    finally:
        score(None)


def test_a_head_that_is_trained_or_adapted_keeps_its_logits():
    model = make("llama")
    assert not use_scoring_head(model)  # its weights are trained
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert not use_scoring_head(adapted)
    assert use_scoring_head(get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"])))


def test_nothing_known_about_a_token_that_is_not_a_number():
    hidden, weight, _, scored = inputs(torch.float32)
    hidden[3] = float("nan")
    found = token_scores(hidden, weight, None, scored)
    assert found.isnan().all(1).nonzero().flatten().tolist() == [3]
