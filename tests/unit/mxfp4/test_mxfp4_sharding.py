"""Packed parameters under FSDP2 of the torch versions that the GPU and NPU profiles pin: what those call, called here.

The files of `torch/distributed/fsdp/_fully_shard` from the wheels of 2.10.0 and 2.11.0 were put in place of 2.13's. One
gloo rank (with 2.11.0 two) rejected packed parameters: "only Tensors of floating point dtype can require gradients".
After `allow_packed_shards` the ranks sharded them, and the outputs equalled the whole model's to the last bit, with and
without bfloat16 mixed precision. tests/unit/mxfp4/test_mxfp4_linear.py shards them on 2.13.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard import _fsdp_param

from verl_aqn.mxfp4.sharding import allow_packed_shards

PACKED = torch.arange(64, dtype=torch.uint8).view(2, 32)


def older_init_dtype_attrs(self, mp_policy) -> None:
    """Behave as 2.10 and 2.11, also for integers: gathered tensors are cast to the policy's dtype."""
    self.orig_dtype = self.sharded_param.dtype
    self.param_dtype = None if mp_policy.param_dtype == self.orig_dtype else mp_policy.param_dtype


def gathered_as(parameter: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that FSDP2 casts a parameter to under bfloat16 mixed precision; None: no cast."""
    param = SimpleNamespace(sharded_param=parameter)
    _fsdp_param.FSDPParam.init_dtype_attrs(param, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return param.param_dtype


@pytest.fixture
def version(monkeypatch):
    """`version(text)`: make torch report another version. Its FSDP2 is restored afterwards."""
    monkeypatch.setattr(_fsdp_param, "nn", nn)
    monkeypatch.setattr(_fsdp_param.FSDPParam, "init_dtype_attrs", older_init_dtype_attrs)
    return lambda text: monkeypatch.setattr(torch, "__version__", text)


@pytest.mark.parametrize("old", ["2.10.0+cpu", "2.11.0"])
def test_the_parameter_of_a_shard_is_what_its_dtype_can_be(version, old):
    with pytest.raises(RuntimeError, match="floating point"):
        _fsdp_param.nn.Parameter(PACKED)  # as _init_sharded_param does before it sets requires_grad
    assert gathered_as(PACKED) == torch.bfloat16
    version(old)
    allow_packed_shards()
    allow_packed_shards()  # actor and critic may share a process
    packed = _fsdp_param.nn.Parameter(PACKED)
    assert type(packed) is nn.Parameter
    assert not packed.requires_grad
    assert torch.equal(packed, PACKED)
    assert _fsdp_param.nn.Parameter(PACKED.float()).requires_grad
    assert not _fsdp_param.nn.Parameter(PACKED.float(), requires_grad=False).requires_grad
    assert _fsdp_param.nn.Module is nn.Module
    assert gathered_as(PACKED) is None
    assert gathered_as(PACKED.float()) == torch.bfloat16


def test_a_torch_that_can_is_left_alone(version):
    version("2.13.0+cpu")
    allow_packed_shards()
    assert _fsdp_param.nn is nn
    assert _fsdp_param.FSDPParam.init_dtype_attrs is older_init_dtype_attrs
