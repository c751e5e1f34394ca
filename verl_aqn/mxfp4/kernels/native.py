"""MXFP4, and rounding to MXFP8, on a CPU through ``native.cpp``, which is compiled on first use and kept in the cache.

Without a C++ compiler, or with ``VERL_AQN_NATIVE=0``, `reference` is used, which gives the same bits more slowly.
`status` tells which kernels are used and why.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from verl_aqn.cache import cache_dir
from verl_aqn.safe_files import own_folder

_SOURCE = Path(__file__).with_name("native.cpp")
_HEADERS = ("avx512.h", "error_parts.h", "mxfp8.h", "norm.h", "product.h", "transposed.h")
_INCLUDED = [_SOURCE.with_name(name) for name in _HEADERS]
_FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-pthread"]
if platform.machine() == "x86_64":
    _FLAGS.append("-mprefer-vector-width=512")  # for CPUs with AVX-512; 20 % to 33 % faster than GCC's default
# Torch's OpenMP is already loaded under the same name, so that both share one set of threads.
_OPENMP = "-fopenmp"
_RULES = {"mse": 0, "even": 1, "floor": 2, "rceil": 3}
_ROUNDINGS = {"nearest": 0, "half_away": 1, "stochastic": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Minimum work per thread: starting a thread costs as much as quantising some ten thousand elements.
_ELEMENTS_PER_THREAD = 1 << 18
_NUMBERS_PER_THREAD = 1 << 14  # of a norm: starting OpenMP's threads takes as long as a few thousand
_PARTS = 7  # of `error_parts`, as in error_parts.h
_BLOCKS_PER_SUM = 1024


class Status(NamedTuple):
    """Whether this process uses the compiled kernels, and the path of the library or the reason why not."""

    available: bool
    detail: str


def available() -> bool:
    """Return whether the compiled kernels can be used here; compile them first (four seconds) if needed."""
    return _library()[0] is not None


def status() -> Status:
    """Return the result of `available`, with the path of the library or the reason why there is none."""
    library, detail = _library()
    return Status(library is not None, detail)


def quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, packed: Tensor, scale: Tensor) -> None:
    """Compute `reference.quantize`."""
    _call_quantize(x, scale_rule, rounding, seed, packed.data_ptr(), scale.data_ptr(), None)


def fake_quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, out: Tensor) -> None:
    """Compute `reference.fake_quantize`."""
    _call_quantize(x, scale_rule, rounding, seed, None, None, out.data_ptr())


def dequantize(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Compute `reference.dequantize`."""
    library = _library()[0]
    assert library is not None
    blocks = packed.shape[0]
    library.aqn_dequantize(
        packed.data_ptr(), scale.data_ptr(), blocks, DTYPES[out.dtype], out.data_ptr(), _threads(blocks)
    )


def mxfp8_fake_quantize(x: Tensor, out: Tensor) -> None:
    """Fill ``out`` [B, 32] with ``x`` [B, 32] of the same dtype, rounded as `verl_aqn.mxfp4.mxfp8` defines."""
    library = _library()[0]
    assert library is not None
    blocks = x.shape[0]
    library.aqn_mxfp8_fake_quantize(x.data_ptr(), DTYPES[x.dtype], blocks, out.data_ptr(), _threads(blocks))


def dequantize_transposed(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Fill ``out`` bfloat16 [K, N] from the contiguous ``packed`` uint8 [N, K/2] and ``scale`` uint8 [N, K/32]."""
    library = _library()[0]
    assert library is not None
    rows, blocks = scale.shape
    library.aqn_dequantize_transposed(
        packed.data_ptr(), scale.data_ptr(), rows, blocks, out.data_ptr(), min(_threads(rows * blocks), max(blocks, 1))
    )


def can_multiply() -> bool:
    """Return whether `multiply` can be called here: it needs a processor with AVX512-BF16, and OpenMP."""
    library = _library()[0]
    return library is not None and bool(library.aqn_can_multiply())


def multiply(
    packed: Tensor, scale: Tensor, x: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:
    """Return ``x W^T + (x A^T) B^T + bias`` bfloat16 [T, N] for the contiguous ``x`` bfloat16 [T, K].

    W [N, K] is given by ``packed`` uint8 [N, K/2] and ``scale`` uint8 [N, K/32]; A [r, K] and B [N, r] may be None.
    All tensors are contiguous, ``bias`` [N], A and B are bfloat16. Sums are float32; ``x A^T`` and the result are
    rounded once. The result of a token does not depend on the other tokens.
    """
    library = _library()[0]
    assert library is not None
    (tokens, k), n = x.shape, len(packed)
    y = x.new_empty(tokens, n)
    rank, inner = 0, None
    if a is not None:
        rank = len(a)
        inner = x.new_empty(tokens, rank)
    library.aqn_multiply(
        packed.data_ptr(), scale.data_ptr(), n, k, x.data_ptr(), tokens, _address(bias), _address(a), _address(b), rank,
        _address(inner), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor | None]:
    """Return ``(z / rms(z) * weight, z)`` bfloat16 [..., H] for ``z = x + residual``; z is None without a residual.

    ``x`` and ``residual`` are contiguous bfloat16 [..., H], ``weight`` is float32 [H]. Everything is computed in
    float32 and rounded once.
    """
    library = _library()[0]
    assert library is not None
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    threads = max(1, min(torch.get_num_threads(), x.numel() // _NUMBERS_PER_THREAD))
    library.aqn_rms_norm(
        x.data_ptr(), _address(residual), weight.data_ptr(), epsilon, rows, width, y.data_ptr(), _address(total),
        threads,
    )  # fmt: skip
    return y, total


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def error_parts(x: Tensor, packed: Tensor, scale: Tensor) -> list[float]:
    """Sum the parts of the error of the codes of ``x`` [B, 32]: the fields of `ErrorSplit` without ``elements``.

    The result does not depend on the number of threads.
    """
    library = _library()[0]
    assert library is not None
    blocks = x.shape[0]
    parts = torch.empty(-(-blocks // _BLOCKS_PER_SUM), _PARTS, dtype=torch.float64)
    library.aqn_error_parts(
        x.data_ptr(),
        DTYPES[x.dtype],
        packed.data_ptr(),
        scale.data_ptr(),
        blocks,
        _BLOCKS_PER_SUM,
        parts.data_ptr(),
        _threads(blocks),
    )
    return [math.fsum(part) for part in parts.T.tolist()]


def _call_quantize(
    x: Tensor, scale_rule: str, rounding: str, seed: int, packed: int | None, scale: int | None, fake: int | None
) -> None:
    library = _library()[0]
    assert library is not None
    blocks = x.shape[0]
    library.aqn_quantize(
        x.data_ptr(),
        DTYPES[x.dtype],
        blocks,
        _RULES[scale_rule],
        _ROUNDINGS[rounding],
        seed & (1 << 64) - 1,
        packed,
        scale,
        fake,
        _threads(blocks),
    )


def _threads(blocks: int) -> int:
    return max(1, min(torch.get_num_threads(), blocks * 32 // _ELEMENTS_PER_THREAD))


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """Return (the loaded library, its path), or (None, the reason why there is none)."""
    if os.environ.get("VERL_AQN_NATIVE") == "0":
        return None, "switched off by VERL_AQN_NATIVE=0"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None, "no C++ compiler (c++, g++, clang++): install one, for example the package g++"
    try:
        file = _built(compiler)
        library = ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [f"exit code {error.returncode}"]
        return None, f"{compiler} could not compile {_SOURCE.name}: {lines[0]}"
    except OSError as error:
        return None, f"cannot build or load the library: {error}"
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.aqn_quantize.argtypes = [
        pointer, integer, ctypes.c_int64, integer, integer, ctypes.c_uint64, pointer, pointer, pointer, integer
    ]  # fmt: skip
    library.aqn_dequantize.argtypes = [pointer, pointer, ctypes.c_int64, integer, pointer, integer]
    library.aqn_mxfp8_fake_quantize.argtypes = [pointer, integer, ctypes.c_int64, pointer, integer]
    library.aqn_error_parts.argtypes = [
        pointer, integer, pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer, integer
    ]  # fmt: skip
    library.aqn_dequantize_transposed.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer, integer]
    library.aqn_can_multiply.restype = integer
    integer64 = ctypes.c_int64
    library.aqn_multiply.argtypes = [
        pointer, pointer, integer64, integer64, pointer, integer64, pointer, pointer, pointer, integer64, pointer,
        pointer, integer,
    ]  # fmt: skip
    library.aqn_rms_norm.argtypes = [
        pointer, pointer, pointer, ctypes.c_double, integer64, integer64, pointer, pointer, integer
    ]  # fmt: skip
    for function in (
        library.aqn_multiply,
        library.aqn_rms_norm,
        library.aqn_quantize,
        library.aqn_dequantize,
        library.aqn_error_parts,
        library.aqn_dequantize_transposed,
        library.aqn_mxfp8_fake_quantize,
    ):
        function.restype = None
    return library, str(file)


def _built(compiler: str) -> Path:
    """Return the file of the library; compile it if the cache has none for this source, compiler and CPU."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(b"".join(file.read_bytes() for file in (_SOURCE, *_INCLUDED)))
    # The key includes the CPU's features: machines may share a cache, and -march=native depends on the machine.
    key.update(repr((_FLAGS, _OPENMP, version, platform.machine(), _cpu_features())).encode())
    file = cache_dir() / "kernels" / f"mxfp4-{key.hexdigest()[:16]}.so"
    own_folder(file.parent, "VERL_AQN_CACHE=DIR", or_roots=True)  # the files in this folder are loaded as code
    if not file.is_file():
        # Several processes may compile at once: each compiles into its own folder, and all rename to the same file.
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            new = Path(folder) / file.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(new)]
            # A compiler without OpenMP (clang without libomp) builds everything but `multiply`.
            if subprocess.run([*command, _OPENMP], capture_output=True).returncode:
                subprocess.run(command, capture_output=True, text=True, check=True)
            new.rename(file)
    return file


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
