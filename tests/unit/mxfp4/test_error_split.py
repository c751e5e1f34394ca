"""The four parts of the error add up, and each is what its name says."""

import pytest
import torch

from tests.helpers.sqnr import energies
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import SCALE_RULES, Mxfp4Tensor, dequantize, quantize
from verl_aqn.mxfp4.error_split import ErrorSplit, split_error
from verl_aqn.mxfp4.kernels import native

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture(params=["native", "plain"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with the compiled and with the plain code."""
    if request.param == "plain":
        monkeypatch.setattr(native, "available", lambda: False)


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(96, 1056, generator=generator)
    return {
        "gauss": normal.to(dtype),
        "heavy tails": (normal / torch.rand(96, 1056, generator=generator).clamp(min=1e-3)).to(dtype),
        "tiny and zero": (normal * torch.tensor([1e-30, 0.0, 1.0] * 352)).to(dtype),
        "on the grid": torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, -6.0] * 132).expand(96, -1).to(dtype),
    }


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", weights())
def test_parts_add_up_to_the_whole_error(name: str, dtype: torch.dtype, rule: str) -> None:
    weight = weights(dtype)[name]
    codes = quantize(weight, rule)
    split = split_error(weight, *codes)
    signal, noise = energies(weight, dequantize(*codes))
    assert split.signal == pytest.approx(signal, rel=1e-12)
    assert split.noise == pytest.approx(noise, rel=1e-12, abs=0)
    assert split.deadzone + split.clipped + split.scale_bias + split.grid_noise == pytest.approx(split.noise, rel=1e-15)
    assert split.elements == weight.numel()


def test_they_add_up_for_codes_of_any_origin() -> None:
    weight = weights()["gauss"]
    packed = torch.randint(256, (96, 528), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    scale = torch.randint(120, 130, (96, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    split = split_error(weight, packed, scale)
    assert split.noise == pytest.approx(energies(weight, dequantize(packed, scale))[1], rel=1e-12)


def one_block(values: list[float], rule: str = "floor") -> ErrorSplit:
    weight = torch.tensor(values + [0.0] * (32 - len(values)), dtype=torch.float64).float()
    return split_error(weight, *quantize(weight, rule))


def test_each_part_by_hand() -> None:
    # amax 4 under the floor rule: scale 1, values of at most 0.25 become zero.
    split = one_block([4.0, 0.25, -0.125])
    assert (split.deadzone, split.dead) == (0.25**2 + 0.125**2, 2)
    assert split[2:5] == (0, 0, 0)
    # amax 7.5: scale 1, and 7.5 saturates at 6; so does -6.5.
    split = one_block([7.5, -6.5])
    assert (split.clipped, split.saturated) == (1.5**2 + 0.5**2, 2)
    assert (split.scale_bias, split.grid_noise, split.dead) == (0, 0, 0)
    # amax 6 has its ideal scale, 1. Only the grid's error remains: 5.5 rounds to 6, and 1.2 to 1.
    split = one_block([6.0, 5.5, 1.2])
    assert split.grid_noise == pytest.approx(0.5**2 + 0.2**2, rel=1e-6)
    assert (split.deadzone, split.clipped, split.scale_bias) == (0, 0, 0)
    # amax 5 is exact under 5/6 but not under 1, where it rounds to 4: the whole error is the scale's.
    split = one_block([5.0])
    assert (split.scale_bias, split.grid_noise) == (1.0, pytest.approx(0, abs=1e-24))
    # 4 is exact under 1 but not under 5/6 (4.8, which rounds to 4): here the power of two is better.
    split = one_block([5.0, 4.0])
    assert split.grid_noise == pytest.approx((4 - 4 * 5 / 6) ** 2)
    assert split.scale_bias == pytest.approx(1 - split.grid_noise)


def test_rceil_never_clips_and_floor_clips_most() -> None:
    weight = weights()["gauss"]
    clipped = {rule: split_error(weight, *quantize(weight, rule)).clipped_share for rule in SCALE_RULES}
    assert clipped["rceil"] == 0
    assert clipped["floor"] == max(clipped.values()) > 0.01


def test_shares_of_a_gaussian() -> None:
    weight = weights()["gauss"]
    split = split_error(weight, *quantize(weight, "even"))
    assert 0.08 < split.deadzone_share < 0.11  # "about 9 %", arXiv 2605.20402
    assert 0.7 < split.grid_noise / split.noise < 0.85


def test_a_zero_weight_has_no_error_and_pooling_sums() -> None:
    zero = split_error(torch.zeros(2, 64), *quantize(torch.zeros(2, 64)))
    assert zero == ErrorSplit(elements=128)
    assert zero.sqnr_db == float("inf")
    weight = weights()["gauss"]
    codes = quantize(weight)
    halves = [split_error(weight[rows], *(c[rows] for c in codes)) for rows in (slice(0, 40), slice(40, 96))]
    whole, pooled = split_error(weight, *codes), ErrorSplit.pooled(halves)
    assert pooled == pytest.approx(whole, rel=1e-12)
    assert (pooled.dead, pooled.saturated, pooled.elements) == (whole.dead, whole.saturated, whole.elements)


def test_refuses_codes_of_another_shape() -> None:
    codes = Mxfp4Tensor(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises((ModelError, RuntimeError)):
        split_error(torch.ones(2, 64), *codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 3000])
def test_the_compiled_code_finds_the_same_parts(rows: int, dtype: torch.dtype) -> None:
    """Weights of all sizes, values at the edges of the groups, and codes from elsewhere with any scale."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 32, generator=generator)
    edges = torch.tensor([0.0, -0.0, 0.25, 0.5, 2.0, 4.0, 5.0, 6.0, 6.01, 7.0, 8.0])
    at_edge = torch.rand(weight.shape, generator=generator) < 0.3
    weight[at_edge] = edges[torch.randint(len(edges), (int(at_edge.sum()),), generator=generator)]
    weight = (weight * torch.exp2(torch.randint(-8, 8, (rows, 1), generator=generator))).to(dtype)
    elsewhere = Mxfp4Tensor(
        torch.randint(256, (rows, 16), dtype=torch.uint8, generator=generator),
        torch.randint(110, 140, (rows, 1), dtype=torch.uint8, generator=generator),
    )
    for codes in (*(quantize(weight, rule) for rule in SCALE_RULES), elsewhere):
        split = split_error(weight, *codes)
        plain = split_error(weight.double(), *codes)  # float64 has no compiled code
        assert (split.elements, split.dead, split.saturated) == (plain.elements, plain.dead, plain.saturated)
        for name in ("signal", "deadzone", "clipped", "grid_noise"):
            assert getattr(split, name) == pytest.approx(getattr(plain, name), rel=1e-12, abs=1e-14 * plain.noise)
        assert split.scale_bias == pytest.approx(plain.scale_bias, rel=1e-12, abs=1e-12 * plain.noise)


def test_threads_and_strides_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3000, 128, generator=torch.Generator().manual_seed(0))
    codes = quantize(weight)
    split = split_error(weight, *codes)
    monkeypatch.setattr(native, "_threads", lambda blocks: 5)
    assert split_error(weight, *codes) == split
    assert split_error(weight.t().contiguous().t(), *codes) == split
    assert split_error(weight.requires_grad_(), *codes) == split
    empty = Mxfp4Tensor(torch.empty(0, 32, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.uint8))
    assert split_error(torch.empty(0, 64), *empty) == ErrorSplit()
