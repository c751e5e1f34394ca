"""MXFP4 in int8 with a power of two for each row: what is exact, what is lost, and that a loss cannot hide."""

import math

import pytest
import torch

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import dequantize, int8_rows, quantize
from verl_aqn.mxfp4.int8_change import (
    LIMIT_BASE,
    LIMIT_MATRIX,
    Change,
    base_fault,
    matrix_fault,
    sentence,
    summary,
)
from verl_aqn.mxfp4.int8_rows import to_int8

EVERY_CODE = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8)  # of one block


def blocks_of_all_codes(*exponents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row, with a block of every code for each exponent of a scale."""
    return EVERY_CODE.repeat(1, len(exponents)), torch.tensor([[127 + e for e in exponents]], dtype=torch.uint8)


def plain(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An independent definition: the finest power of two for a row that clips nothing."""
    values = dequantize(packed, scale, torch.float64)
    largest = values.abs().amax(1, keepdim=True).clamp(min=2.0**-119)
    step = torch.exp2(torch.ceil(torch.log2(largest / 127)))
    return torch.round(values / step), step


@pytest.mark.parametrize("rule", ["mse", "even"])
def test_it_is_the_finest_power_of_two_that_clips_nothing(rule):
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * torch.exp2(torch.randint(-20, 20, (64, 1)).float())
    weight[:, ::50] *= 30
    packed, scale = quantize(weight.bfloat16(), rule)
    made, change = to_int8(packed, scale)
    codes, step = plain(packed, scale)
    assert torch.equal(made.codes.double(), codes)
    assert torch.equal(made.scale.double(), step)
    assert (made.codes.dtype, made.scale.dtype) == (torch.int8, torch.bfloat16)
    assert set(made.codes.abs().amax(1).tolist()) <= {64, 96}
    values = dequantize(packed, scale, torch.float64).unflatten(1, (-1, 32))
    lost = (codes * step).unflatten(1, (-1, 32)) - values
    errors = torch.where(values.norm(dim=-1) > 0, lost.norm(dim=-1) / values.norm(dim=-1), 0.0)
    assert change.blocks == errors.numel()
    assert 0 < change.changed == int((lost != 0).any(-1).sum()) < change.blocks
    assert change.error == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-9)


@pytest.mark.parametrize(("lower", "exact"), [(0, True), (1, True), (3, True), (4, False), (200, False)])
def test_blocks_up_to_three_powers_of_two_below_the_largest_are_exact(lower, exact):
    packed, scale = blocks_of_all_codes(100, 100 - lower)
    made, change = to_int8(packed, scale)
    assert torch.equal(made.values(), dequantize(packed, scale)) is exact
    assert (change.changed == 0) is exact
    assert (change.error == 0) is exact


def test_one_small_weight_that_is_lost_counts():
    packed = torch.zeros(1, 32, dtype=torch.uint8)
    packed[0, 0], packed[0, 16] = 7, 1  # 6 in the first block, and a half in the second
    made, change = to_int8(packed, torch.tensor([[127, 123]], dtype=torch.uint8))
    assert made.codes.count_nonzero() == 1
    assert change == Change(blocks=2, changed=1, squares=1.0)


def test_values_have_no_negative_zero_and_are_exact_in_bfloat16():
    packed, scale = blocks_of_all_codes(0, 1, 2, 3)
    made, _ = to_int8(packed, scale)
    values, dense = made.values(), dequantize(packed, scale)
    assert torch.equal(values, dense)  # -0 equals 0
    assert bool(torch.signbit(dense)[dense == 0].any())
    assert not bool(torch.signbit(values)[values == 0].any())
    assert torch.equal(values.double(), made.codes.double() * made.scale.double())


def test_all_scales_of_one_block_are_right_or_refused():
    """Also those at the ends of the range: 2^-127 is no normal bfloat16, and 6 * 2^127 is not finite."""
    for byte in range(256):
        packed, scale = EVERY_CODE[None], torch.tensor([[byte]], dtype=torch.uint8)
        if not dequantize(packed, scale).isfinite().all():
            with pytest.raises(ModelError, match=r"q_proj holds values that are not finite in bfloat16"):
                to_int8(packed, scale, "q_proj")
            continue
        made, change = to_int8(packed, scale)
        same = torch.equal(made.values(), dequantize(packed, scale))
        assert same is (change.changed == 0)
        assert same is (byte >= 2), byte  # below, halves would need a scale that is no normal bfloat16
        assert made.scale.item() >= 2.0**-126
        assert made.codes.abs().max() <= 96


def test_rows_of_zeros_are_zeros():
    made, change = to_int8(torch.full((2, 16), 0x88, dtype=torch.uint8), torch.tensor([[0], [127]], dtype=torch.uint8))
    assert not made.codes.any()
    assert made.scale.tolist() == [[1.0], [1.0]]
    assert change == Change(2, 0, 0.0)


@pytest.mark.parametrize("times", [100, 1e4, 1e8, 1e30])
def test_a_large_weight_cannot_hide_what_is_lost_beside_it(times):
    """The error beside the norm of the whole matrix would tend to zero while all other weights become zero."""
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = times
    packed, scale = quantize(weight.bfloat16(), "mse")
    made, change = to_int8(packed, scale)
    values = dequantize(packed, scale, torch.float64)
    lost = made.codes * made.scale.double() - values
    assert change.error > 0.3
    assert (lost.norm() / values.norm()).item() < 0.01 or times == 100  # the usual figure says that all is well
    assert matrix_fault("m", change.error)


def test_a_block_far_below_its_row_counts_although_its_squares_are_zero_in_float32():
    packed, scale = blocks_of_all_codes(110, -120)
    _, change = to_int8(packed, scale)
    assert (change.blocks, change.changed, change.squares) == (2, 1, 1.0)


def test_parts_of_a_large_matrix_are_converted_as_the_whole(monkeypatch):
    packed, scale = quantize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) ** 5, "mse")
    whole = to_int8(packed, scale)
    monkeypatch.setattr(int8_rows, "_CHUNK", 64 * 7)
    parts = to_int8(packed, scale)
    assert all(torch.equal(one, other) for one, other in zip(whole[0], parts[0], strict=True))
    assert (parts[1].blocks, parts[1].changed) == (whole[1].blocks, whole[1].changed)
    assert parts[1].squares == pytest.approx(whole[1].squares) != 0


def test_changes_are_added_and_told():
    changes = {"a": Change(100, 1, 0.25), "b": Change(300, 2, 0.05), "c": Change(0, 0, 0.0)}
    found = summary(changes)
    assert found == {"blocks": 400, "changed": 3, "error": math.sqrt(0.3 / 400), "matrix": "a", "matrix_error": 0.05}
    assert sentence(found) == (
        "3 of 400 blocks (0.75 %) have other values in int8 than in the packed base, with an error of 2.7 % over all "
        "blocks and at most 5 % in a matrix (a)"
    )
    assert sentence(summary({"a": Change(8)})) == "all 8 blocks have the packed base's values in int8"
    assert (matrix_fault("a", LIMIT_MATRIX), base_fault(LIMIT_BASE)) == ("", "")
    assert matrix_fault("o_proj", 0.05).startswith("o_proj would change by 5 % in int8, more than 2 %, because")
    assert "rollout_weight_format=bf16" in base_fault(0.006)
    assert "\n" not in matrix_fault("a", 1) + base_fault(1)
