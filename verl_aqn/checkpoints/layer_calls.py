"""Record with which arguments a decoder calls each of its layers, without running a layer.

A decoder's forward picks masks, position embeddings and per-layer inputs for each layer. So the forward itself is
asked: it runs once while every layer is an identity that records its call.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl_aqn.errors import ModelError, first_line


class Call(NamedTuple):
    """What a layer gets beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _NotHandedOn(Exception):
    """A layer got something else than what the layer before returned."""


@torch.no_grad()
def record_calls(
    decoder: nn.Module, layers: nn.ModuleList, ids: Tensor, factor: float = 1
) -> tuple[Tensor, list[Call]]:
    """Return the hidden states into the first layer, and the `Call` of every layer, for tokens ``ids`` int64 [S, L].

    Every layer returns its hidden states times ``factor``. Containers in a call are the decoder's own objects:
    what one layer leaves in them, later layers find there.

    Raises:
        ModelError: the decoder does not call its layers one after the other, each on the last one's output.
    """
    faults = []
    # Newer layers return a tensor, older ones a tuple, of which the second item is for attention weights.
    for give in (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None)):
        try:
            return _run(decoder, layers, ids, factor, give)
        except (_NotHandedOn, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            faults.append(first_line(error))
    raise _refusal(decoder, f"layers do not simply follow each other ({faults[0]})")


@torch.no_grad()
def check_decoder(decoder: nn.Module, layers: nn.ModuleList, ids: Tensor) -> None:
    """Check on tokens ``ids`` int64 [S, L] that layers can be run one at a time with their recorded calls.

    Raises:
        ModelError: layers share modules, or a layer's arguments depend on what earlier layers return.
    """
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers):
        if any(owners.setdefault(id(module), index) != index for module in layer.modules()):
            raise _refusal(decoder, "layers share modules")
    _, calls = record_calls(decoder, layers, ids)
    _, others = record_calls(decoder, layers, ids, factor=2)
    for index, (call, other) in enumerate(zip(calls, others, strict=True)):
        for name, a, b in zip(_names(call), _values(call), _values(other), strict=True):
            if kind := _unknown_type(a):
                raise _refusal(decoder, f"layer {index} gets a {kind} ({name}), which may carry state")
            if not _same(a, b):
                raise _refusal(decoder, f"layer {index}'s argument {name} depends on what earlier layers return")


def _refusal(decoder: nn.Module, fault: str) -> ModelError:
    return ModelError(f"cannot calibrate {type(decoder).__name__}: its {fault}; quantise without calibration")


def _run(
    decoder: nn.Module, layers: nn.ModuleList, ids: Tensor, factor: float, give: Callable[[Tensor], Any]
) -> tuple[Tensor, list[Call]]:
    seen: list[Tensor] = []
    calls: list[Call] = []

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index != len(calls) or (seen and hidden is not seen[-1]):
                raise _NotHandedOn(f"layer {index} does not get the output of layer {index - 1}")
            if not seen:
                seen.append(hidden)
            calls.append(Call(args[1:], kwargs))
            seen.append(hidden if factor == 1 else hidden * factor)
            return give(seen[-1])

        return forward

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.__dict__.pop, "forward", None)
            layer.forward = recorder(index)
        decoder(input_ids=ids, use_cache=False)
    if len(calls) != len(layers):
        raise _NotHandedOn(f"{len(calls)} of {len(layers)} layers are called")
    return seen[0], calls


def _names(call: Call) -> list[str]:
    return [*(f"#{i}" for i in range(1, len(call.args) + 1)), *call.kwargs]


def _values(call: Call) -> list[Any]:
    return [*call.args, *call.kwargs.values()]


def _unknown_type(value: Any) -> str:
    """Return the type of what is neither a value nor a container of values, such as a cache; else an empty string."""
    if isinstance(value, (list, tuple)):
        return next((kind for item in value if (kind := _unknown_type(item))), "")
    if isinstance(value, Mapping):
        return _unknown_type(list(value.values()))
    known = value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))
    return "" if known else type(value).__name__


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a == b
