"""A rank of `verl_aqn.selftest.shard_rung` with one fault, named by the variable SELFTEST_FAULT."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from verl_aqn.selftest import shard_rung

fault, rank = os.environ["SELFTEST_FAULT"], int(sys.argv[1])
fully_shard, train = shard_rung.fully_shard, shard_rung._train


def changed(module: Any, **more: Any) -> Any:
    made = fully_shard(module, **more)
    for parameter in made.parameters() if isinstance(module, torch.nn.Sequential) else ():
        if parameter.dtype == torch.uint8 and rank == 1:
            parameter.to_local().view(-1)[0] ^= 1
    return made


def without_sync(model: Any, *arguments: Any) -> Any:
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
    return train(model, *arguments)


def twice(model: Any, *arguments: Any) -> Any:
    out = train(model, *arguments)
    return 1.1 * out if hasattr(model, "set_requires_gradient_sync") else out


if fault == "not sharded":
    shard_rung.fully_shard = lambda module, **more: module
elif fault == "a bit of a shard":
    shard_rung.fully_shard = changed
elif fault == "gradients of one rank":
    shard_rung._train = without_sync
elif fault == "another output":
    shard_rung._train = twice
elif fault == "a rank that dies" and rank == 1:
    os._exit(9)

shard_rung.main(rank, int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
