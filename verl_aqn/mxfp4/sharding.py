"""Support for packed parameters under FSDP2 in the torch version that the NPU profile pins."""

import types
from typing import Any

import torch
from torch import Tensor, nn

# The first torch version with pytorch pull request 178075 among those that this project was tested with.
_FIXED = (2, 13)


def allow_packed_shards() -> None:
    """Make `fully_shard` accept uint8 parameters in torch before 2.13 (pytorch issue 177844).

    Older versions have two problems with integers. They create the parameter of a shard with the default
    requires_grad=True of nn.Parameter and set the original value only in the next line; torch rejects the first step.
    And mixed precision casts integers when they are gathered, so that a layer would find its bytes as bfloat16. The
    patch changes FSDP2's own module: the default of requires_grad depends on the dtype, and integers are not cast.
    Float parameters are treated as before. From torch 2.13 on nothing is patched.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < _FIXED:
        _patch()


def _patch() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    if _fsdp_param.nn is not nn:  # already patched in this process
        return

    def parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)

    init_dtype_attrs = _fsdp_param.FSDPParam.init_dtype_attrs

    def without_casting_integers(self: Any, mp_policy: Any) -> None:
        init_dtype_attrs(self, mp_policy)
        if not self.orig_dtype.is_floating_point:
            self.param_dtype = None

    _fsdp_param.nn = types.SimpleNamespace(**vars(nn) | {"Parameter": parameter})  # type: ignore[assignment]
    _fsdp_param.FSDPParam.init_dtype_attrs = without_casting_integers  # type: ignore[method-assign]
