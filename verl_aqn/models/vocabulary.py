"""Log-probs and entropies of tokens from hidden states, without the logits of all tokens at once.

The logits of a step are its largest tensor: 3,072 tokens of a vocabulary of 49,152 are 0.6 GB in fp32, and a softmax
with its gradient needs several of them. Here the head works on a few tokens at a time, in buffers that are used again
(the idea of Liger-Kernel's fused linear cross-entropy). The head is frozen, so the gradient of a log-prob with respect
to its hidden state is known during the forward: a [N, H] tensor is kept for the backward instead of [N, V].
"""

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BUFFER = 24 << 20
"""Bytes of one fp32 buffer [tokens, V]: small products are slower, and large buffers do not fit in a CPU's cache."""


@dataclass(frozen=True)
class Scored:
    """The tokens to score: `label` int64 [N], `temperature` (one, or fp32 [N]), and whether entropies are needed."""

    label: Tensor
    temperature: float | Tensor = 1.0
    entropy: bool = False


_SCORED: ContextVar[Scored | None] = ContextVar("scored", default=None)


def score(tokens: Scored | None) -> None:
    """Make every `ScoringHead` score `tokens` from now on (None: return logits)."""
    _SCORED.set(tokens)


class ScoringHead(nn.Linear):
    """A head that returns fp32 [..., 2] (log-prob and entropy of N given tokens) in place of logits [..., V].

    It does so after `score(tokens)`, and otherwise what `nn.Linear` returns.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits, or scores, for `hidden` [..., H]."""
        tokens = _SCORED.get()
        if tokens is None:
            return super().forward(hidden)
        found = token_scores(hidden.reshape(-1, hidden.shape[-1]), self.weight, self.bias, tokens)
        return found.view(*hidden.shape[:-1], 2)


def use_scoring_head(model: Any) -> bool:
    """Turn a model's head into a `ScoringHead`; return False if the head is not a frozen, plain linear layer."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return False
    head.__class__ = ScoringHead
    return True


def token_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Scored) -> Tensor:
    """Return fp32 [N, 2]: log-prob and entropy (0 if it is not needed) of the tokens after `hidden` [N, H].

    `weight` [V, H] and `bias` [V] get no gradient. The product is computed in the dtype of autocast, or of `weight`.

    Raises:
        ValueError: there is not one hidden state for each token.
    """
    if len(hidden) != len(tokens.label):
        raise ValueError(f"{len(hidden)} hidden states for {len(tokens.label)} tokens")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    bias = bias if bias is None else bias.to(dtype)
    temperature = tokens.temperature
    if not isinstance(temperature, Tensor):
        temperature = torch.tensor(float(temperature), device=hidden.device).expand(len(hidden))
    temperature = temperature.float().clamp(min=1e-8).unsqueeze(1)  # [N, 1]
    with torch.autocast(kind, enabled=False):
        return _Score.apply(hidden.to(dtype), weight.to(dtype), bias, tokens.label, temperature, tokens.entropy)


def scores_of(logits: Tensor, tokens: Scored) -> Tensor:
    """Return the same fp32 [N, 2] from logits [N, V], for models that change the logits of their head."""
    temperature = tokens.temperature
    if isinstance(temperature, Tensor):
        logits = logits.float() / temperature.float().unsqueeze(1).clamp(min=1e-8)
    else:
        logits = logits.float() / max(float(temperature), 1e-8)
    logp = torch.log_softmax(logits, dim=-1)
    entropy = -(logp.exp() * logp).sum(-1) if tokens.entropy else logp.new_zeros(len(logp))
    return torch.stack([logp.gather(1, tokens.label.unsqueeze(1)).squeeze(1), entropy], 1)


class _Score(torch.autograd.Function):
    """Log-prob and entropy in chunks. The gradient of log-probs is computed in the forward, that of entropies later."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, label, temperature, entropy):
        found = torch.zeros(len(hidden), 2, dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # of the log-probs
        for at, low, x, e in _chunks(hidden, weight, bias, temperature):
            total = e.sum(-1, keepdim=True)
            of = label[at].unsqueeze(1)
            found[at, :1] = x.gather(1, of) - total.log()
            if entropy:  # log Σe − Σ e·x / Σe
                found[at, 1:] = total.log() - torch.bmm(e.unsqueeze(1), x.unsqueeze(2)).squeeze(2) / total
            if slope is not None:
                e.div_(-total).scatter_add_(1, of, torch.ones_like(total))
                low.copy_(e.div_(temperature[at]))
                torch.mm(low, weight, out=slope[at])
        if slope is not None:
            saved = (hidden, weight, bias, temperature) if entropy else (None, None, None, None)
            ctx.save_for_backward(slope, found, *saved)
        return found

    @staticmethod
    def backward(ctx, grad):
        slope, found, hidden, weight, bias, temperature = ctx.saved_tensors
        result = slope * grad[:, :1].to(slope.dtype)
        if hidden is not None and bool(grad[:, 1].any()):
            for at, low, x, e in _chunks(hidden, weight, bias, temperature):
                total = e.sum(-1, keepdim=True)
                # dH/dx_j = −p_j · (log p_j + H)
                x.sub_(total.log()).add_(found[at, 1:]).mul_(e.div_(-total)).div_(temperature[at])
                low.copy_(x)
                result[at] += (low @ weight) * grad[at, 1:].to(low.dtype)
        return result, None, None, None, None, None


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield parts of the tokens: their slice, a buffer in the dtype of `hidden`, x and exp(x), all [tokens, V].

    x is logits / temperature in fp32, less their maximum. The same buffers are used for every part.
    """
    size = len(weight)
    most = max(1, min(len(hidden), BUFFER // (4 * size)))
    low = hidden.new_empty(most, size)
    x, e = (torch.empty(most, size, dtype=torch.float32, device=hidden.device) for _ in range(2))
    for start in range(0, len(hidden), most):
        at = slice(start, min(start + most, len(hidden)))
        count = at.stop - at.start
        logits, shifted, exp = low[:count], x[:count], e[:count]
        if bias is None:
            torch.mm(hidden[at], weight.T, out=logits)
        else:
            torch.addmm(bias, hidden[at], weight.T, out=logits)
        shifted.copy_(logits).div_(temperature[at])
        shifted.sub_(shifted.amax(-1, keepdim=True))
        yield at, logits, shifted, torch.exp(shifted, out=exp)
