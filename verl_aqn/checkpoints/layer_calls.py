"""Recording of the arguments with which a decoder calls each of its layers, without running a layer.

A decoder's forward chooses masks, position embeddings and per-layer inputs for each layer. To get these arguments, the
forward runs once while every layer is replaced by an identity that records its call.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl_aqn.errors import ModelError, first_line


class Call(NamedTuple):
    """The arguments of a layer except the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _NotHandedOn(Exception):
    """A layer received something else than the output of the previous layer."""


@torch.no_grad()
def record_calls(
    decoder: nn.Module, layers: nn.ModuleList, ids: Tensor, factor: float = 1
) -> tuple[Tensor, list[Call]]:
    """Return the input of the first layer, and the `Call` of every layer, for tokens ``ids`` int64 [S, L].

    Every replaced layer returns its hidden states times ``factor``. Containers in a call are the decoder's own objects:
    later layers see what earlier layers store in them.

    Raises:
        ModelError: the decoder does not call its layers in order, each on the output of the previous one.
    """
    faults = []
    # Newer layers return a tensor, older layers a tuple whose second item holds attention weights.
    for give in (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None)):
        try:
            return _run(decoder, layers, ids, factor, give)
        except (_NotHandedOn, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            faults.append(first_line(error))
    raise _refusal(decoder, f"layers do not run in simple sequence ({faults[0]})")


@torch.no_grad()
def check_decoder(decoder: nn.Module, layers: nn.ModuleList, ids: Tensor) -> None:
    """Check with tokens ``ids`` int64 [S, L] that layers can be run one at a time with their recorded calls.

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
                raise _refusal(decoder, f"layer {index}'s argument {name} depends on the output of earlier layers")


def _refusal(decoder: nn.Module, fault: str) -> ModelError:
    return ModelError(f"cannot calibrate {type(decoder).__name__}: its {fault}: quantise without calibration")


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
    """Return the type name of an object that is neither a value nor a container of values; else an empty string.

    A cache is such an object.
    """
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
