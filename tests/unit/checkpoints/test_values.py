"""One digest for the same values in every dtype that can represent them."""

import pytest
import torch

from verl_aqn.checkpoints.values import as_matrix, narrowest, plain_digest, values_digest


@pytest.mark.parametrize("wide", [torch.float16, torch.float32, torch.float64])
def test_the_same_values_have_one_digest_in_any_dtype(wide):
    values = torch.tensor([[1.0, -0.0, 0.5], [float("inf"), 2.0**-10, 3.0]]).bfloat16()
    assert plain_digest(values.to(wide)) == plain_digest(values) == values_digest(values)
    assert narrowest(values.to(wide)).dtype == torch.bfloat16
    assert plain_digest(values.view(6).to(wide)) == plain_digest(values.view(6)) != plain_digest(values)


@pytest.mark.parametrize("change", [2.0**-9, 2.0**-20])
def test_what_bfloat16_cannot_hold_shows(change):
    values = torch.ones(4, 8)
    values[2, 3] += change
    assert narrowest(values).dtype in (torch.float16, torch.float32)
    assert plain_digest(values) != plain_digest(torch.ones(4, 8))
    assert torch.equal(narrowest(values).float(), values)
    assert narrowest(values + 2.0**-23).dtype == torch.float32


def test_signs_of_zero_and_nans_count():
    assert plain_digest(torch.zeros(4)) != plain_digest(-torch.zeros(4))
    nan = torch.full((4,), float("nan"))
    assert plain_digest(nan) == plain_digest(nan.clone()) != plain_digest(torch.zeros(4))
    assert plain_digest(torch.ones(4, dtype=torch.int32)) != plain_digest(torch.ones(4))


def test_shapes_become_matrices():
    for shape, matrix in (((), (1, 1)), ((5,), (5, 1)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4))):
        assert as_matrix(torch.zeros(shape)).shape == matrix
