"""Detection of the norms of a model that can carry noise, with the reasons why other norms cannot.

A norm is recognised by what it computes, because class names differ between transformers and vLLM. An error of a module
is not raised here: it is recorded as the reason, and `verl_aqn.noise.injector` reports it if the noise specification
needs the module.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from verl_aqn.checkpoints.naming import Naming
from verl_aqn.errors import first_line

GATES = {"gate", "z", "g"}  # names of the second input of a gated norm


@dataclass(frozen=True)
class Form:
    """The formula of a norm: (offset + w) · x/rms(x), or with `centred` (offset + w) · (x - mean)/std [+ bias]."""

    offset: float
    centred: bool = False


@dataclass
class Survey:
    """Norms by module name: those in `found` can carry noise, those in `lacking` cannot, with the reason."""

    found: dict[str, Form] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)


def find_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norms of `model` that can carry noise, by name, including q_norm and k_norm.

    These are RMSNorms and LayerNorms with a 1-D floating point `weight` and at most a `bias` as second parameter. Norms
    with a gate are left out (they are parts of linear attention), and so are the towers of a multimodal model. `model`
    may be on the meta device.
    """
    return {name: model.get_submodule(name) for name in survey(model).found}


def survey(model: nn.Module) -> Survey:
    """Test every module of `model` that looks like a norm."""
    result = Survey()
    for name, module in _text_modules(model):
        if not _looks_like_a_norm(module):
            continue
        try:
            form = _form_of(module)
        except Exception as error:  # third-party modules may raise any error
            form = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(form, Form):
            result.found[name] = form
        else:
            result.lacking[name] = f"{type(module).__name__} cannot carry noise, because {form}"
    return result


def canonical_names(model: Any) -> Callable[[str], str]:
    """Return a function from a module's name to its name in the checkpoint, which is used to draw noise in any process.

    An engine records during loading which tensor of the folder each of its parameters holds (`aqn_names`). For a model
    of transformers, `Naming` gives the names. Names in other models are not changed.
    """
    if loaded := getattr(model, "aqn_names", None):
        return lambda name: str(loaded.get(f"{name}.weight", f"{name}.weight")).removesuffix(".weight")
    if known := getattr(model, "checkpoint_names", None):  # the names in the folder that the model was loaded from
        return known.in_checkpoint
    if isinstance(model, PreTrainedModel):
        return Naming.of_model(model).in_checkpoint
    return lambda name: name


def _text_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of everything in the language model, without the towers for images and sound."""
    inner = _language_model(model)
    prefix = next((name for name, module in model.named_modules() if module is inner), "")
    for name, module in inner.named_modules():
        yield ".".join(part for part in (prefix, name) if part), module


def _language_model(model: Any) -> nn.Module:
    """Return the text part of a multimodal model, as vLLM or transformers define it, or else the whole model."""
    try:
        if hasattr(model, "get_language_model"):
            inner = model.get_language_model()
        elif model.config.get_text_config() is not model.config:
            inner = model.get_decoder()
        else:
            return model
    except Exception:  # no config, or a class without these methods
        return model
    return inner if isinstance(inner, nn.Module) else model


def _looks_like_a_norm(module: nn.Module) -> bool:
    """Return whether a module has an epsilon and only a 1-D `weight` and at most a `bias` of the same size."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or not weight.is_floating_point():
        return False
    if any(name not in ("weight", "bias") or p.shape != weight.shape for name, p in parameters.items()):
        return False
    # In torch.nn.RMSNorm an epsilon of None means that of the dtype.
    if not any("eps" in name for name in vars(module)) or hasattr(module, "running_mean"):
        return False
    return not any(GATES & inspect.signature(forward).parameters.keys() for forward in _forwards(module))


def _forwards(module: Any) -> list[Callable]:
    """Return the forward methods to test: vLLM's `forward_native`, if any, and `forward`, which may use a kernel."""
    native = getattr(module, "forward_native", None)
    return [module.forward] if native is None else [native, module.forward]


def _form_of(module: nn.Module) -> Form | str:
    """Return the formula of the norm, or the reason why it cannot carry noise. Errors of the module may be raised."""
    if next(module.parameters()).is_meta:
        module = _with_values(module)
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    # With mean 1, the output shows whether the mean is subtracted.
    x = torch.linspace(-1.0, 3.0, weight.numel(), device=weight.device).expand(1, -1)
    failures = []
    for dtype in dict.fromkeys((x.dtype, weight.dtype)):  # torch's LayerNorm needs one dtype for all tensors
        for forward in _forwards(module):
            try:
                with torch.no_grad():
                    out = forward(x.to(dtype).clone())
            except Exception as error:
                failures.append(f"its {forward.__name__} raises {type(error).__name__}: {first_line(error)}")
                continue
            out = out[0] if isinstance(out, tuple) else out  # some norms also return the residual
            if not isinstance(out, torch.Tensor) or out.shape != x.shape:
                failures.append(f"its {forward.__name__} does not return a tensor of its input's shape")
            elif form := _fits(module, x.to(dtype).float(), out.float()):
                return form
            else:
                failures.append("its output is neither w·x/rms(x) nor w·(x - mean)/std + b")
    return failures[0]


def _fits(module: nn.Module, x: torch.Tensor, out: torch.Tensor) -> Form | None:
    """Return the form whose output for `x` is nearest to `out`, if it is near enough."""
    weight: torch.Tensor = module.weight.detach().float()  # type: ignore[operator]
    bias = getattr(module, "bias", None)
    shift = 0.0 if bias is None else bias.detach().float()
    eps = next((v for name, v in vars(module).items() if "eps" in name and isinstance(v, float)), 0.0)
    eps = eps or torch.finfo(x.dtype).eps
    plain = {False: x * torch.rsqrt(x.pow(2).mean() + eps)}
    centred = x - x.mean()
    plain[True] = centred * torch.rsqrt(centred.pow(2).mean() + eps)
    forms = [Form(offset, mean) for mean in plain for offset in (0.0, 1.0)]
    errors = {f: (out - plain[f.centred] * (weight + f.offset) - shift).norm() for f in forms}
    form = min(errors, key=lambda f: errors[f])
    # 1 % is above the rounding errors of 16-bit weights and far below the effect of subtracting the mean.
    return form if errors[form] <= 0.01 * out.norm() else None


def _with_values(module: nn.Module) -> nn.Module:
    """Copy a norm from meta to the CPU, with values that distinguish the forms."""
    copied = copy.deepcopy(module).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            low, high = (0.5, 1.5) if name == "weight" else (-0.1, 0.1)
            parameter.copy_(torch.linspace(low, high, parameter.numel()))
    return copied
