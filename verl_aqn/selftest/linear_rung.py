"""The rung of the packed linear layer against a dense layer with the same weights. Needs only torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verl_aqn.mxfp4 import Mxfp4Linear
from verl_aqn.selftest import definition
from verl_aqn.selftest.codec_rungs import seconds_of
from verl_aqn.selftest.rung import Broken, Context, Reading

N, K, T = 512, 256, 64
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Largest allowed ‖device − float64‖ / ‖float64‖; TF32 and Ascend's HF32 round float32 inputs to about 2^-11."""
LOOSE = {torch.bfloat16: 2e-2, torch.float32: 2e-3}
SAME, SAME_LOOSE = 1e-3, 5e-3
"""Largest allowed relative distance from a dense layer of the same dtype on a CPU, and on an accelerator, where a
product with another layout may be summed in parts that are rounded."""
SPEED = (1024, 1536, 8960)  # tokens, K, N of Qwen2.5-1.5B's largest layer


def check(context: Context) -> Reading:
    """Compare values, gradients, saved memory and time of the packed layer with those of a dense one."""
    device = context.device
    far: dict[str, float] = {}
    packed, weight = _packed(device)
    for cached in (False, True):
        packed.cache_dequantized = cached
        for dtype in DTYPES:
            found = _compare(packed, weight, dtype, device, f"{'cached, ' if cached else ''}{dtype}")
            far[str(dtype).removeprefix("torch.")] = max(found, far.get(str(dtype).removeprefix("torch."), 0.0))
    packed.cache_dequantized = False
    _saves_only_bytes(packed, device)
    times = _times(device)
    figures = {"relative_error": far, **times}
    return Reading(
        f"relative error {far['bfloat16']:.1e} in bfloat16 and {far['float32']:.1e} in float32; forward and backward "
        f"take {times['time_of_bf16']:.2f} of a bf16 layer's time, weights {times['bytes_of_bf16']:.3f} of its bytes",
        figures,
    )


def _packed(device: str) -> tuple[Mxfp4Linear, Tensor]:
    """Return a layer with random codes on the device, and its weight [N, K] by the definition in float64."""
    generator = torch.Generator().manual_seed(2)
    layer = Mxfp4Linear(K, N, bias=True, device="cpu")
    layer.weight_packed.data = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    layer.weight_scale.data = torch.randint(118, 124, (N, K // 32), generator=generator, dtype=torch.uint8)
    assert layer.bias is not None
    layer.bias.data = torch.randn(N, generator=generator).bfloat16()
    codes, scales = layer.weight_packed.view(-1, 16).tolist(), layer.weight_scale.view(-1).tolist()
    rows = [definition.values(block, scale) for block, scale in zip(codes, scales, strict=True)]
    return layer.to(device), torch.tensor(rows, dtype=torch.float64).view(N, K)


def _compare(layer: Mxfp4Linear, weight: Tensor, dtype: torch.dtype, device: str, what: str) -> float:
    """Return the larger relative error of output and gradient.

    Raises:
        Broken: an output or a gradient is too far from the dense layer's or from float64's.
    """
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(T, size, generator=generator).to(dtype) for size in (K, N))
    ours = _run(layer, x, grad, device)
    dense = nn.Linear(K, N, dtype=dtype, device=device)
    assert layer.bias is not None
    dense.weight.data, dense.bias.data = weight.to(device, dtype), layer.bias.data.to(dtype)
    same = _run(dense, x, grad, device)
    bias = layer.bias.detach().double().cpu()
    exact = F.linear(x.double(), weight, bias), grad.double() @ weight, grad.double().sum(0)
    worst = 0.0
    for name, got, peer, want in zip(
        ("output", "gradient of x", "gradient of the bias"), ours, same, exact, strict=True
    ):
        off, beside = _far(got, want), _far(got, peer)
        limit = TOLERANCE[dtype] if device == "cpu" else LOOSE[dtype]
        # A bias in bfloat16 has its gradient in bfloat16.
        limit = max(limit, TOLERANCE[torch.bfloat16]) if name == "gradient of the bias" else limit
        allowed = SAME if device == "cpu" else SAME_LOOSE
        allowed = limit if name == "gradient of the bias" else allowed
        if not (off <= limit and beside <= allowed):
            raise Broken(
                f"{name} ({what}) differs: {off:.2e} from float64 (allowed {limit:g}), {beside:.2e} from a dense layer "
                f"(allowed {allowed:g})"
            )
        worst = max(worst, off) if name != "gradient of the bias" else worst
    return worst


def _run(layer: nn.Module, x: Tensor, grad: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x = x.to(device).requires_grad_()
    output = layer(x)
    bias = layer.bias
    assert isinstance(bias, Tensor)
    grads = torch.autograd.grad(output, (x, bias), grad.to(device))
    return output.detach(), grads[0], grads[1]


def _far(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    return ((got - want).norm() / want.norm()).item()


def _saves_only_bytes(layer: Mxfp4Linear, device: str) -> None:
    """Check that autograd saves the packed bytes and no 16-bit weight."""
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.ones(2, K, dtype=torch.bfloat16, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    large = [tensor for tensor in saved if tensor.is_floating_point() and tensor.numel() >= N * K]
    if large or not any(tensor.dtype == torch.uint8 for tensor in saved):
        raise Broken(f"backward keeps {[str(t.dtype) for t in saved]} of {[t.numel() for t in saved]} elements")


def _times(device: str) -> dict[str, float]:
    """Return time and bytes of a packed layer as fractions of a bf16 layer's, forward and backward."""
    tokens, k, n = SPEED
    torch.manual_seed(0)
    dense = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    packed = Mxfp4Linear.from_linear(dense)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)

    def seconds(layer: nn.Module) -> float:
        return seconds_of(lambda: torch.autograd.grad(layer(x), x, grad), device, 3)

    ratio = seconds(packed) / seconds(dense)
    held = sum(parameter.nbytes for parameter in packed.parameters())
    return {"time_of_bf16": ratio, "bytes_of_bf16": held / dense.weight.nbytes}
