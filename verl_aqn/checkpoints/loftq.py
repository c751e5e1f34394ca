"""A LoRA adapter that starts out by absorbing the quantisation error (LoftQ, Li et al. 2024, arXiv 2310.08659).

W [N, K] becomes Q + B A with Q in MXFP4 and B A of rank r: Q = quantise(W - B A) and B A = the best rank r of W - Q, by
turns. Served with its adapter, the base is nearer to W than plain rounding; served without it, it is further away.
So the reference policy of an RL run must include the initial adapter: the "adapter switched off" reference that verl
takes for LoRA would be that worse base.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from verl_aqn.checkpoints.adapter import PEFT_PREFIX
from verl_aqn.checkpoints.error_report import QuantReport
from verl_aqn.checkpoints.loading import empty_model, load_model
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.checkpoints.packing_plan import EXCLUDE, make_plan
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.checkpoints.writing import new_folder
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4.codec import Mxfp4Tensor, dequantize, quantize


def loftq(weight: Tensor, rank: int, rounds: int = 5) -> tuple[Mxfp4Tensor, Tensor, Tensor]:
    """(Q, A float32 [r, K], B float32 [N, r]) with ``weight`` [N, K] ≈ Q + B A; deterministic.

    Raises:
        ConfigError: the rank is not between 1 and min(N, K), or there is no round.
        ModelError: as `quantize`.
    """
    if not 1 <= rank <= min(weight.shape) or rounds < 1:
        raise ConfigError(f"LoftQ: rank={rank}, rounds={rounds} does not fit a weight {list(weight.shape)}")
    weight = weight.detach().float()
    a, b = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    for _ in range(rounds):
        codes = quantize(weight - b @ a, "mse")
        a, b = _best_rank(weight - dequantize(*codes, dtype=torch.float32), rank)
    return codes, a, b


def loftq_checkpoint(
    src: str | Path,
    dst: str | Path,
    adapter: str | Path,
    rank: int = 32,
    alpha: float = 32,
    rslora: bool = False,
) -> QuantReport:
    """Write the packed base of ``src`` to the new folder ``dst`` and its PEFT adapter to the new folder ``adapter``.

    PEFT multiplies B A by alpha / r, or by alpha / sqrt(r) with ``rslora``; the stored A and B make up for that.

    Raises:
        ModelError, ConfigError: as `quantize_checkpoint` and `loftq`.
    """
    from peft import LoraConfig, get_peft_model

    scaling = alpha / (math.sqrt(rank) if rslora else rank)
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def quantizer(name: str, weight: Tensor) -> Mxfp4Tensor:
        codes, a, b = loftq(weight, rank)
        factors[name] = (a / math.sqrt(scaling), b / math.sqrt(scaling))
        return codes

    _check_linear(Path(src))
    with new_folder(Path(adapter)) as folder:
        report = quantize_checkpoint(src, dst, "mse", quantizer=quantizer)
        config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=list(factors))
        model = get_peft_model(load_model(dst), config)
        model.peft_config["default"].base_model_name_or_path = str(dst)
        for name, (a, b) in factors.items():
            layer = model.get_submodule(PEFT_PREFIX + name)
            layer.lora_A["default"].weight.data = a
            layer.lora_B["default"].weight.data = b
        model.save_pretrained(folder, save_embedding_layers=False)
    return report


def _check_linear(src: Path) -> None:
    """Raise ModelError where quantising packs what PEFT would not find as a linear layer: experts, renamed modules."""
    linears = {name for name, module in empty_model(src).named_modules() if isinstance(module, nn.Linear)}
    for piece in make_plan(src, Weights(src), EXCLUDE).pieces:
        if piece.module not in linears:
            raise ModelError(
                f"LoftQ: {piece.module} of {src} is no linear layer of the model, so no adapter can absorb its error: "
                "quantise without LoftQ"
            )


def _best_rank(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r], of equal norms, with B A the best rank r of ``residual`` [N, K] (Eckart-Young).

    By the eigenvectors of the smaller Gram matrix in float64, several times faster than an SVD of the whole.
    """
    if residual.shape[0] < residual.shape[1]:
        b, a = _best_rank(residual.T, rank)
        return a.T.contiguous(), b.T.contiguous()
    wide = residual.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    top = vectors[:, -rank:]
    root = values[-rank:].clamp(min=0).sqrt().sqrt()  # of the singular values
    # A singular value of zero belongs to no error: its column of B is zero, whatever it is divided by.
    b = wide @ top / root.clamp(min=1e-30)
    return (top * root).T.float().contiguous(), b.float().contiguous()
