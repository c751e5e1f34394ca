"""The compiled product of activations with a packed weight and an adapter, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.kernels import native

pytestmark = pytest.mark.skipif(
    "not native.can_multiply()", reason="needs AVX512-BF16 and OpenMP: others multiply with dequantised weights"
)

# tokens, K, N, rank, bias: rows and tokens that fill no tile, ranks that fill no register, several pieces of x.
SHAPES = [
    (1, 32, 1, 0, False),
    (5, 64, 50, 8, True),
    (7, 576, 960, 96, False),
    (3, 96, 3, 3, True),
    (16, 576, 64, 32, True),
    (300, 1536, 37, 16, True),
    (1000, 576, 18, 33, False),
]


def operands(tokens: int, k: int, n: int, rank: int, bias: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    packed, scale = quantize((torch.randn(n, k) * 0.02 * 2.0 ** torch.randint(-9, 9, (n, 1))).bfloat16(), "mse")
    a = torch.randn(rank, k).bfloat16() * 0.02 if rank else None
    b = torch.randn(n, rank).bfloat16() if rank else None
    return packed, scale, torch.randn(tokens, k).bfloat16(), torch.randn(n).bfloat16() if bias else None, a, b


def exact(packed: Tensor, scale: Tensor, x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Return the product in float64, with what is rounded to bfloat16 rounded: x Wᵀ + bias, and x Aᵀ."""
    y = x.double() @ dequantize(packed, scale, torch.float32).double().T
    if bias is not None:
        y += bias.double()
    if a is None or b is None:
        return y
    return y.bfloat16().double() + (x.double() @ a.double().T).bfloat16().double() @ b.double().T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_the_nearest_bfloat16(shape: tuple) -> None:
    """Up to the error of float32 sums: where a sum is near the middle of two bfloat16, either of them may come out."""
    given = operands(*shape)
    y, wanted = native.multiply(*given), exact(*given).bfloat16()
    assert (y == wanted).float().mean() > 0.98
    packed, scale, x, bias, a, b = given
    step = (x.double() @ dequantize(packed, scale, torch.float32).double().T + (0 if bias is None else bias)).abs()
    if a is not None and b is not None:
        step += (x.double() @ a.double().T).abs() @ b.double().abs().T
    assert torch.all((y.double() - wanted.double()).abs() <= 2**-7 * (step + wanted.double().abs()) + 2**-20)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_a_token_s_result_depends_neither_on_the_other_tokens_nor_on_threads(shape: tuple) -> None:
    packed, scale, x, bias, a, b = operands(*shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([native.multiply(packed, scale, x[i : i + 1], bias, a, b) for i in range(3)])
        torch.set_num_threads(3)
        assert torch.equal(native.multiply(packed, scale, x, bias, a, b)[:3], alone)
    finally:
        torch.set_num_threads(threads)


def test_it_gives_what_torch_s_products_give_one_after_the_other() -> None:
    given = operands(48, 576, 960, 96, False)
    packed, scale, x, _, a, b = given
    parts = F.linear(x, dequantize(packed, scale, torch.bfloat16)).addmm_(F.linear(x, a), b.t())
    wanted = exact(*given)
    ours, theirs = ((y.double() - wanted).square().mean() for y in (native.multiply(*given), parts))
    assert ours <= 1.01 * theirs
    assert (native.multiply(*given) == parts).float().mean() > 0.99


def test_every_code_and_scale_is_multiplied() -> None:
    """One token of ones per scale: all 16 codes, with the values that `dequantize` gives them."""
    scale = torch.arange(2, 250, dtype=torch.uint8).unsqueeze(1)
    packed = torch.arange(16, dtype=torch.uint8).repeat(len(scale), 1) * 17  # both nibbles of each code
    x = torch.eye(32).bfloat16()
    assert torch.equal(native.multiply(packed, scale, x, None, None, None), dequantize(packed, scale, torch.bfloat16).T)


def test_nothing_is_written_beyond_the_result() -> None:
    packed, scale, x, bias, a, b = operands(5, 64, 50, 8, True)
    memory = torch.full((7, 50), 3.0, dtype=torch.bfloat16)

    class Given(Tensor):
        def new_empty(self, *shape: int) -> Tensor:  # type: ignore[override]
            return memory[1:6] if shape == (5, 50) else torch.empty(shape, dtype=torch.bfloat16)

    native.multiply(packed, scale, x.as_subclass(Given), bias, a, b)
    assert torch.equal(memory[[0, 6]], torch.full((2, 50), 3.0).bfloat16())
    assert torch.equal(memory[1:6], native.multiply(packed, scale, x, bias, a, b))
