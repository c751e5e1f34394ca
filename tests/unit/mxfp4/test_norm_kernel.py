"""The compiled RMSNorm of the rollout, against its definition in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers.builds import compile_for_any_cpu
from verl_aqn.mxfp4.kernels import native


@pytest.fixture(scope="module", autouse=True, params=["this CPU", "any CPU"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "any CPU":
            compile_for_any_cpu(patch, tmp_path_factory.mktemp("cache"))
        yield


def exact(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()


@pytest.mark.parametrize("shape", [(1, 576), (16, 576), (7, 50), (5, 1537), (3, 2, 64), (300, 576)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_the_norm_by_definition(shape: tuple[int, ...], residual: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).bfloat16() * 3, torch.randn(shape[-1])
    rest = torch.randn(shape).bfloat16() if residual else None
    given = x.clone(), None if rest is None else rest.clone()
    y, total = native.rms_norm(x, rest, weight, 1e-5)
    summed = x.float() if rest is None else x.float() + rest.float()
    wanted = exact(summed, weight, 1e-5)
    assert (y == wanted.bfloat16()).float().mean() > 0.99
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=0)
    assert total is None if rest is None else torch.equal(total, summed.bfloat16())
    assert torch.equal(x, given[0])
    assert rest is None or torch.equal(rest, given[1])


def test_epsilon_and_every_weight_count() -> None:
    x, weight = torch.full((1, 64), 2.0**-10).bfloat16(), torch.ones(64)
    small, large = (native.rms_norm(x, None, weight, epsilon)[0] for epsilon in (1e-12, 1.0))
    assert small.float().mean() == pytest.approx(1, abs=0.01)
    assert large.float().mean() == pytest.approx(2.0**-10, rel=0.01)
    for place in (0, 31, 63):
        noisy = weight.clone()
        noisy[place] = 3
        changed = native.rms_norm(x, None, noisy, 1e-12)[0] != small
        assert changed.nonzero()[:, 1].tolist() == [place]


def test_values_that_are_no_numbers_stay_so() -> None:
    x = torch.ones(3, 64).bfloat16()
    x[0, 5], x[1, 5] = float("nan"), float("inf")
    y, total = native.rms_norm(x, torch.ones_like(x), torch.ones(64), 1e-6)
    assert y[0].isnan().all()
    assert y[1, 5].isnan()
    assert y[1, 6] == 0
    assert torch.equal(y[2], torch.ones(64).bfloat16())
    assert total is not None
    assert total[0, 5].isnan()
    assert total[1, 5].isinf()
    # The bits of this NaN would become those of −0 if they were rounded up.
    weight = torch.ones(64)
    weight[3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert native.rms_norm(torch.ones(1, 64).bfloat16(), None, weight, 1e-6)[0].isnan().nonzero().tolist() == [[0, 3]]


def test_threads_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(301, 576).bfloat16(), torch.randn(576)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    several = native.rms_norm(x, x, weight, 1e-5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert all(torch.equal(one, other) for one, other in zip(several, native.rms_norm(x, x, weight, 1e-5), strict=True))
