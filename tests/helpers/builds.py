"""The compiled kernels as another CPU would compile them."""

import functools
import platform
from pathlib import Path

import pytest

from verl_aqn.mxfp4.kernels import native


def compile_for_any_cpu(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Compile the kernels for the oldest CPU of this kind, without AVX-512, and use them until ``patch`` is undone."""
    if platform.machine() != "x86_64":
        pytest.skip("the kernels use special instructions only on x86_64")
    flags = ["-march=x86-64" if flag == "-march=native" else flag for flag in native._FLAGS]
    patch.setenv("VERL_AQN_CACHE", str(cache))
    patch.setattr(native, "_FLAGS", flags)
    patch.setattr(native, "_library", functools.cache(native._library.__wrapped__))
    assert native.available(), native.status().detail
