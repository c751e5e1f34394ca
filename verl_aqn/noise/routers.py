"""Detection of the norms that feed the router of a mixture of experts, by running the layers and not by names.

Noise on these norms changes the routing (measured in the fork, where a rule by names missed them: 92.7 % → 33.6 % on a
30B model).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import nn

from verl_aqn.errors import ModelError, first_line

# How layers call their parts: transformers with [batch, tokens, hidden] and tuples, vLLM with [tokens, hidden].
_SHAPES = ((1, 1), (1,))
_ANSWERS = (lambda t: t, lambda t: (t, None), lambda t: (t, None, None))


def router_norms(model: nn.Module, norms: Mapping[str, nn.Module]) -> set[str]:
    """Return those of `norms` (by name) whose output enters a mixture of experts, and those inside of one.

    Experts are found by their parameters: three-dimensional stacks [E, …], or a list of E modules of one class with two
    or three matrices each. The layer that contains them is then run once for each of its norms, with all its parts
    replaced: the tested norm returns NaN, and all other parts return zeros. The norm feeds the router if the NaN
    reaches the experts. This works with residual streams, fused add-and-norm, and sandwich norms.

    Raises:
        ModelError: a layer cannot be run in this way.
    """
    try:
        return _router_norms(model, norms)
    except ModelError:
        raise
    except Exception as error:  # third-party layers may raise any error
        raise ModelError(
            f"{type(model).__name__}: cannot find the norms that feed its routers ({type(error).__name__}: "
            f"{first_line(error)}): exclude them in aqn.noise.exclude and set aqn.noise.router_norms=true"
        ) from error


def _router_norms(model: nn.Module, norms: Mapping[str, nn.Module]) -> set[str]:
    fed: set[str] = set()
    seen: set[str] = set()
    for path in _experts(model):
        block, layer_name = _around(model, path, norms)
        if block is None or block in seen:
            continue
        seen.add(block)
        fed |= {name for name in norms if name.startswith(f"{block}.")}
        layer = model.get_submodule(layer_name) if layer_name else model
        parts = _parts(layer, layer_name)
        inside = {name: part for name, part in parts.items() if name in norms}
        fed |= {name for name in inside if _reaches(layer, layer_name, parts, inside, block, name)}
    return fed


def _experts(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        stacks = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
        stacked = len(stacks) > 1 and len(set(stacks)) == 1 and stacks[0] > 1
        listed = isinstance(module, nn.ModuleList) and len(module) > 1 and _are_experts(list(module))
        # The experts of vLLM have this attribute; a kernel may have changed the shape of their weights.
        if stacked or listed or hasattr(module, "local_num_experts"):
            yield name


def _are_experts(modules: list[nn.Module]) -> bool:
    """Return whether modules have one class and equal shapes, with two or three matrices each.

    Decoder layers have more matrices.
    """
    shapes = [[tuple(p.shape) for p in module.parameters()] for module in modules]
    alike = len({type(module) for module in modules}) == 1 and all(shape == shapes[0] for shape in shapes)
    return alike and 2 <= sum(len(shape) == 2 for shape in shapes[0]) <= 3 and len(shapes[0]) <= 6


def _around(model: nn.Module, path: str, norms: Mapping[str, nn.Module]) -> tuple[str | None, str]:
    """Return the part of a layer that contains the experts at `path`, and the layer.

    The layer is the smallest module that also has a norm outside of that part.
    """
    block = path
    while block:
        parent = block.rpartition(".")[0]
        module = model.get_submodule(parent)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            beside = [name for name in _parts(module, parent) if not name.startswith(f"{block}.")]
            if any(name in norms for name in beside):
                return block, parent
        block = parent
    return None, ""


def _parts(layer: nn.Module, layer_name: str) -> dict[str, nn.Module]:
    """Return the modules that the layer's forward calls, by full name: its children, and the children of its lists."""
    parts: dict[str, nn.Module] = {}
    for name, child in layer.named_children():
        full = f"{layer_name}.{name}" if layer_name else name
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            parts |= _parts(child, full)
        else:
            parts[full] = child
    return parts


class _Reached(Exception):
    """Raised when the experts are called; the argument says whether their input contains NaN."""


def _reaches(
    layer: nn.Module, name: str, parts: dict[str, nn.Module], norms: dict[str, nn.Module], block: str, tested: str
) -> bool:
    weight: torch.Tensor = norms[tested].weight  # type: ignore[assignment]
    why = "it does not call its experts"
    for shape, answer in product(_SHAPES, _ANSWERS):
        with torch.no_grad(), _stubs(parts, norms, block, tested, answer):
            try:
                type(layer).forward(layer, **_arguments(layer, _zeros(weight, *shape, weight.numel())))
            except _Reached as reached:
                return bool(reached.args[0])
            except Exception as error:  # expected if the shape or the kind of result is wrong for this layer
                why = f"{type(error).__name__}: {error}".splitlines()[0]
    raise ModelError(
        f"{name} ({type(layer).__name__}): cannot find the norm that feeds its router ({why}): exclude that norm in "
        "aqn.noise.exclude and set aqn.noise.router_norms=true"
    )


def _arguments(layer: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(layer).forward).parameters.items():
        if name in ("hidden_states", "x"):
            arguments[name] = x
        elif name == "positions":
            arguments[name] = torch.zeros(1, dtype=torch.long, device=x.device)
        elif parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            arguments[name] = None
    del arguments["self"]
    return arguments


@contextmanager
def _stubs(
    parts: dict[str, nn.Module], norms: dict[str, nn.Module], block: str, tested: str, answer: Any
) -> Iterator[None]:
    """Put a stand-in for the forward of every part, and take it away again."""

    def first(args: tuple, kwargs: dict) -> torch.Tensor:
        x = next(value for value in (*args, *kwargs.values()) if not _is_index(value))
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"a part was called with a {type(x).__name__}")
        return x

    def experts(*args: Any, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        raise _Reached(any(bool(tensor.isnan().any()) for tensor in tensors))

    def norm(fill: float) -> Callable[..., Any]:
        def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"a norm was called with a {type(x).__name__}")
            out = torch.full_like(x, fill)
            return out if residual is None else (out, torch.zeros_like(residual))

        return forward

    def other(*args: Any, **kwargs: Any) -> Any:
        return answer(torch.zeros_like(first(args, kwargs)))

    replaced = []
    try:
        for name, part in parts.items():
            replaced.append((part, part.__dict__.get("forward")))
            if name == block or name.startswith(f"{block}."):
                part.__dict__["forward"] = experts
            elif name in norms:
                part.__dict__["forward"] = norm(float("nan") if name == tested else 0.0)
            else:
                part.__dict__["forward"] = other
        yield
    finally:
        for part, before in replaced:
            if before is None:
                del part.__dict__["forward"]
            else:
                part.__dict__["forward"] = before


def _is_index(value: Any) -> bool:
    """Return whether a value is None, positions or a mask, which some engines pass before the hidden states."""
    return value is None or (isinstance(value, torch.Tensor) and not value.is_floating_point())


def _zeros(weight: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return zeros with the weight's dtype and device; on the CPU for a weight on meta, which cannot hold a NaN."""
    return torch.zeros(*shape, dtype=weight.dtype, device="cpu" if weight.is_meta else weight.device)
