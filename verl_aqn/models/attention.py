"""Attention for rows that hold each prompt once, registered with transformers' attention interface.

transformers passes the rule of each kind of layer (full, sliding, chunked) to the mask function of an attention
implementation: `rule(batch, head, query, key)` for positions. Here the rule gets the positions that tokens would have
in separate rows, so every layer attends to the same tokens as there. Each layer receives the result of the mask
function as its `attention_mask`. The result contains the layout, so that it is also available in the recomputation of
gradient checkpointing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from verl_aqn.models.shared_prompts import Block, SharedPrompts

NAME = "verl_aqn"
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Arguments that models pass to attention and that do not change its result.
_HARMLESS = {
    "cache_position", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "sliding_window", "use_cache",
}  # fmt: skip
# Maximum ratio of computed to needed queries for which attention without a mask is preferred. With a mask, accelerators
# have no flash kernel.
_WORTH = {True: 1.5, False: 3}  # key: whether the device is a CPU


class LayoutError(RuntimeError):
    """A layer needs something that this attention does not support."""


class SharedMask:
    """The masks [B, 1, R, S] of the blocks, for the layers of one kind in one forward.

    None in place of a mask means causal attention with all tokens of a sequence as queries, including those whose
    output is already known. This is used where it is faster, because kernels are faster without a mask.
    """

    def __init__(self, layout: SharedPrompts, rule: Rule):
        self.layout = layout
        self.masks = [_mask(block, rule) for block in layout.blocks]


class Watch:
    """Observations of one run of a model: the modules with attention, the mask rules of the layers, and arguments."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.rules: list[Rule] = []
        self.arguments: set[str] = set()


_LAYOUT: ContextVar[SharedPrompts | None] = ContextVar("layout", default=None)
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def laid_out(layout: SharedPrompts | None, watch: Watch | None = None) -> Iterator[None]:
    """Run the forwards of models within the block on rows in `layout` (None: ordinary rows)."""
    tokens = _LAYOUT.set(layout), _WATCH.set(watch)
    try:
        yield
    finally:
        _LAYOUT.reset(tokens[0])
        _WATCH.reset(tokens[1])


def lay_out(layout: SharedPrompts | None) -> None:
    """Set the `layout` of rows for all forwards from now on (None: ordinary rows)."""
    _LAYOUT.set(layout)


def mask_function(
    batch_size: int, q_length: int, kv_length: int, mask_function: Rule = causal_mask_function, use_vmap: bool = False,
    **kwargs: Any,
) -> SharedMask | Tensor | None:  # fmt: skip
    """Return the mask for layers of one kind; for ordinary rows the result of `sdpa_mask`."""
    layout, watch = _LAYOUT.get(), _WATCH.get()
    if watch is not None:
        watch.rules.append(mask_function)
    if layout is None:
        if torch._C._current_graph_task_id() != -1:
            raise LayoutError("a mask is computed within a layer, and computed again in the backward pass")
        return sdpa_mask(
            batch_size, q_length, kv_length, mask_function=mask_function, use_vmap=use_vmap, **kwargs
        )  # fmt: skip
    if use_vmap:
        raise LayoutError("the model adds its own rule to its masks")
    if not q_length == kv_length == layout.input_ids.shape[1]:
        raise LayoutError(f"a mask is requested for {q_length} × {kv_length} tokens")
    return SharedMask(layout, mask_function)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SharedMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of query [1, H, L, D] to key and value [1, H', L, D] → [1, L, H, D].

    Raises:
        LayoutError: an argument is not supported.
    """
    watch = _WATCH.get()
    if watch is not None:
        watch.modules.append(module)
        watch.arguments |= {n for n, v in (("softcap", softcap), ("s_aux", s_aux)) if v is not None}
    unknown = sorted(name for name, value in kwargs.items() if name not in _HARMLESS and value is not None)
    if unknown or is_causal is False or kwargs.get("output_attentions"):
        raise LayoutError(f"attention has the argument {unknown[0] if unknown else 'is_causal or output_attentions'}")
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "sinks": s_aux}
    if not isinstance(attention_mask, SharedMask):
        if _LAYOUT.get() is not None:
            raise LayoutError("attention has a mask that does not come from transformers' mask functions")
        causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
        return attend(query, key, value, attention_mask, causal, **options).transpose(1, 2).contiguous(), None
    layout = attention_mask.layout
    if not query.shape[2] == key.shape[2] == value.shape[2] == layout.input_ids.shape[1]:
        raise LayoutError(f"attention of {query.shape[2]} × {key.shape[2]} tokens")
    rows = [states.squeeze(0).transpose(0, 1) for states in (query, key, value)]  # [L, H, D]
    found = []
    for block, mask in zip(layout.blocks, attention_mask.masks, strict=True):
        asking, real = (block.keys, block.real_keys) if mask is None else (block.queries, block.real)
        q, k, v = (
            states.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
            for states, slots in zip(rows, (asking, block.keys, block.keys), strict=True)
        )
        out = attend(q, k, v, mask, mask is None, **options)  # [B, H, R, D]
        found.append(out.transpose(1, 2).flatten(0, 1).index_select(0, real))
    return torch.cat(found).index_select(0, layout.order).unsqueeze(0), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention of query [B, H, R, D] to key and value [B, H', S, D] → [B, H, R, D].

    `mask` [B, 1, R, S] is bool (True where a query attends to a key) or is added to the scores. With `softcap` the
    scores become softcap · tanh(scores / softcap). `sinks` [H] are additional scores, one per head, which take part in
    the softmax without a value.
    """
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return nn.functional.dropout(weights, dropout) @ value


def _mask(block: Block, rule: Rule) -> Tensor | None:
    """Return `rule` at the positions of a block, bool [B, 1, R, S]; None if causal attention without mask is faster."""
    size = block.keys.shape[1]
    key = torch.arange(size, device=block.keys.device)
    query = block.positions[:, None, :, None]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=key.device)
    seen = rule(zero, zero, query, key[None, None, None]).expand(len(block.keys), 1, query.shape[2], size)
    lengths = block.lengths[:, None, None, None]
    if size <= _WORTH[key.device.type == "cpu"] * query.shape[2] and bool((seen == (key <= query)).all()):
        return None
    # A padding query attends to one key, so that its softmax is finite; its output is not used.
    return torch.where(query < lengths, seen & (key < lengths), key == 0)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_function)
