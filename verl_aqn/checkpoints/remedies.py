"""Two remedies of arXiv 2605.20402 in the forms that the plain format, and so a stock engine, can carry.

* Macro-block scaling gives many blocks a common fine-grained factor before they take their powers of two. The format
  has no place for it. But up_proj's rows against down_proj's columns, and v_proj's rows against o_proj's columns, can
  be rescaled without changing the function; the factor then lies in the weights themselves. Norm weights would take
  factors as well, but the exploration noise is made for them as they are.
* Outlier fallback leaves the layers that hurt most in bf16: `exclude` here, ``ignore`` in the written config.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.storage import Spec, Weights, read_config
from verl_aqn.checkpoints.writing import new_folder, write_model
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import dequantize, quantize
from verl_aqn.mxfp4.fused import fused_groups
from verl_aqn.mxfp4.linear import Mxfp4Linear

_STEPS = 8  # factors tried in an octave: the next one up is the same scale with another exponent


def fold_macro_scales(src: str | Path, dst: str | Path) -> int:
    """Write ``src``, a decoder of Llama's form, to ``dst`` in float32, rescaled to be rounded better; same function.

    Every row of up_proj and v_proj takes the factor 2^(i/8), i = 0..7, with the least relative squared error; the
    columns that it meets in down_proj and o_proj take its inverse. A pair of layers keeps its factors only where its
    two relative errors add up to less than before. Returns the number of pairs rescaled.

    Raises:
        ModelError: ``src`` cannot be read, holds no such pair, or ``dst`` exists.
    """
    src, dst = Path(src), Path(dst)
    weights, config = Weights(src), read_config(src)
    pairs = list(_pairs(weights))
    if not pairs:
        raise ModelError(f"{src} has neither up_proj and down_proj beside a gate_proj nor v_proj and o_proj to rescale")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rescaled = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal rescaled
        todo = set(weights.specs)
        for first, second in pairs:
            rows, columns = weights.read(first + ".weight").float(), weights.read(second + ".weight").float()
            factor = _row_factors(rows)
            # Grouped-query attention: one head of v meets several heads of o.
            shared = columns.shape[1] // len(factor)
            inverse = (1 / factor).view(-1, 1, head_dim if shared > 1 else len(factor))
            inverse = inverse.expand(-1, shared, -1).reshape(-1)
            new_rows, new_columns = rows * factor[:, None], columns * inverse
            before = _relative_error(rows) + _relative_error(columns)
            after = _relative_error(new_rows) + _relative_error(new_columns)
            if after < before:
                rescaled += 1
                rows, columns = new_rows, new_columns
                if first + ".bias" in weights.specs:
                    yield first + ".bias", weights.read(first + ".bias").float() * factor
                    todo.remove(first + ".bias")
            yield first + ".weight", rows
            yield second + ".weight", columns
            todo -= {first + ".weight", second + ".weight"}
        for name in sorted(todo):
            yield name, weights.read(name).to(layout[name].dtype)

    layout = {
        name: Spec(torch.float32, spec.shape) if spec.dtype.is_floating_point else spec
        for name, spec in weights.specs.items()
    }
    config.pop("torch_dtype", None)
    with new_folder(dst) as folder:
        write_model(folder, config | {"dtype": "float32"}, layout, tensors(), src, {})
    return rescaled


@torch.inference_mode()
def worst_layers(model: nn.Module, packed: str | Path, ids: Tensor, extra_bytes: int) -> tuple[str, ...]:
    """Linear layers of the packed folder ``packed`` that are best left in 16 bits for ``extra_bytes`` more.

    Each layer of ``model``, the unquantised original, takes its quantised weight in turn, and the divergence
    KL(original || with this layer quantised) on tokens ``ids`` int64 [S, L] says what it costs. Those with the highest
    cost a byte are taken while they fit. q, k and v go together, as do gate and up: vLLM merges them. Comes to one
    forward pass a layer; ``model`` is unchanged afterwards.
    """
    packed_layers = {n: m for n, m in load_model(packed).named_modules() if isinstance(m, Mxfp4Linear)}
    original = model(ids).logits.float().log_softmax(-1)
    costs = []
    for group in fused_groups(packed_layers):
        old = {name: model.get_parameter(f"{name}.weight").data for name in group}
        for name in group:
            model.get_parameter(f"{name}.weight").data = packed_layers[name].weight
        changed = model(ids).logits.float().log_softmax(-1)
        for name in group:
            model.get_parameter(f"{name}.weight").data = old[name]
        # 2 bytes a weight instead of 17/32.
        size = sum(weight.numel() for weight in old.values()) * 47 // 32
        costs.append(((original.exp() * (original - changed)).sum().item() / size, size, group))
    chosen: list[str] = []
    for _, size, group in sorted(costs, reverse=True):
        if size <= extra_bytes:
            chosen += group
            extra_bytes -= size
    return tuple(chosen)


def _pairs(weights: Weights) -> Iterator[tuple[str, str]]:
    """(rows, columns): names of two linear layers between which a factor cancels."""
    for name in sorted(weights.specs):
        module = name.removesuffix(".weight")
        for first, second, witness in (("up_proj", "down_proj", "gate_proj"), ("v_proj", "o_proj", "v_proj")):
            parent = module.removesuffix(first)
            if name.endswith(f".{first}.weight") and {
                f"{parent}{second}.weight",
                f"{parent}{witness}.weight",
            } <= set(weights.specs):
                yield module, parent + second


def _row_factors(weight: Tensor) -> Tensor:
    """Float32 [N]: the factor in [1, 2) under which each row of ``weight`` [N, K] has the least relative error."""
    factors = torch.tensor([2 ** (i / _STEPS) for i in range(_STEPS)])
    errors = torch.stack([_squared_error(weight * f).sum(1) / f**2 for f in factors])
    return factors[errors.argmin(0)]


def _relative_error(weight: Tensor) -> float:
    return (_squared_error(weight).sum() / weight.double().square().sum()).item()


def _squared_error(weight: Tensor) -> Tensor:
    return (weight - dequantize(*quantize(weight, "mse"), dtype=torch.float32)).double().square()
