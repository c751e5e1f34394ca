"""`bench attention` measures three ways to the same values."""

import pytest
import torch

from verl_aqn.bench import attention_speed as attention


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_all_arms_attend_to_the_same(kv_heads):
    arms = attention.arms("cpu", 4, kv_heads, groups=2, samples=3, prompt=5, response=7, dtype=torch.float32)
    dense, separate, shared = (step() for step in arms.values())
    torch.testing.assert_close(dense[0], separate[0])
    torch.testing.assert_close(shared[0], separate[0])
    for one, other in zip(dense[1:], shared[1:], strict=True):  # gradients: the same tokens, by group or in one row
        torch.testing.assert_close(one.flatten(0, 1), other[0])


def test_the_table_has_a_row_a_shape(monkeypatch):
    monkeypatch.setattr(attention, "SHAPES", ((1, 2, 3),))
    result = attention.measure("cpu", 2, 1, 4, 1)
    assert set(result["rows"][0]["seconds"]) == set(attention.ARMS)
    assert attention.table(result).row_count == 1
