"""The devices of this machine, through torch alone."""

from importlib.util import find_spec
from typing import Any

import torch


def find(asked: str) -> tuple[str, int]:
    """Return the kind of device to test and how many there are: `asked`, or the machine's accelerator, or "cpu" and 1.

    Raises:
        RuntimeError: the device that was asked for does not answer.
    """
    kinds = ("npu", "cuda", "cpu") if asked == "auto" else (asked,)
    for kind in kinds:
        if count := _count(kind):
            return kind, count
    raise RuntimeError(f"no {asked} device answers; torch is {torch.__version__}")


def _count(kind: str) -> int:
    if kind == "cpu":
        return 1
    if kind == "npu" and find_spec("torch_npu") is None:
        return 0
    module = runtime(kind)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def runtime(kind: str) -> Any:
    """Return torch's module of a kind of device (torch.cuda, torch.npu), None if there is none."""
    if kind == "npu":
        import torch_npu  # noqa: F401
    return getattr(torch, kind, None)


def synchronize(device: str) -> None:
    """Wait until the device has done all its work; a CPU always has."""
    if device != "cpu":
        runtime(device).synchronize()


def use(device: str) -> None:
    """Touch the device: compute on it and read the result.

    Raises:
        RuntimeError: the result is wrong.
    """
    runtime(device)
    x = torch.arange(256, dtype=torch.float32, device=device).view(16, 16)
    expected = torch.arange(256, dtype=torch.float32).view(16, 16)
    if not torch.equal((x @ torch.eye(16, device=device)).cpu(), expected):
        raise RuntimeError(f"the {device} device multiplies a matrix with the unit matrix and gets another one")
