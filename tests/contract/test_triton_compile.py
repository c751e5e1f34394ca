"""The GPU kernels compile ahead of time, without a GPU, to the memory accesses that they were designed for.

Speed needs a GPU to measure, but the machine code shows accesses of 16 bytes, no use of shared memory, no spilled
registers, and no flushing of subnormals, which would change bits.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from verl_aqn.mxfp4.kernels import gpu

FLOATS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
TOOLS = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"


def compiled(kernel: str, dtype: str, architecture: int, rule: str, rounding: str) -> dict[str, str | bytes]:
    """Return the compilation stages of a launch with tensors of ``dtype``, aligned to 16 bytes as torch does."""
    codes = "*i16" if dtype == "float32" else "*i32"
    arguments = {
        "quantize": {"x_ptr": FLOATS[dtype], "codes_ptr": codes, "scale_ptr": "*u8"},
        "fake_quantize": {"x_ptr": FLOATS[dtype], "out_ptr": FLOATS[dtype]},
        "dequantize": {"codes_ptr": codes, "scale_ptr": "*u8", "out_ptr": FLOATS[dtype]},
    }[kernel] | {"words": "i32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arguments))}
    constants: dict[str, int | str] = {
        "PER": 4 if dtype == "float32" else 8, "WORDS": gpu._WORDS, "STEPS": gpu._STEPS
    }  # fmt: skip
    if kernel != "dequantize":
        arguments |= {"key_low": "i32", "key_high": "i32"}
        constants |= {"RULE": rule, "ROUNDING": rounding}
    source = ASTSource(
        getattr(gpu, f"_{kernel}_kernel"), arguments | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=gpu._OPTIONS).asm


CASES = [
    *(("dequantize", dtype, "", "") for dtype in FLOATS),
    *((kernel, dtype, "even", "nearest") for kernel in ("quantize", "fake_quantize") for dtype in FLOATS),
    *(("quantize", "bfloat16", rule, "nearest") for rule in ("mse", "floor", "rceil")),
    *(("fake_quantize", "bfloat16", "even", rounding) for rounding in ("half_away", "stochastic")),
]


@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize(("kernel", "dtype", "rule", "rounding"), CASES)
def test_memory_accesses(kernel: str, dtype: str, rule: str, rounding: str, architecture: int) -> None:
    asm = compiled(kernel, dtype, architecture, rule, rounding)
    ptx = asm["ptx"]
    loads = re.findall(r"\bld\.global\.([\w.]+)", ptx)
    stores = re.findall(r"\bst\.global\.([\w.]+)", ptx)
    code = "b16" if dtype == "float32" else "b32"
    want_loads, want_stores = {
        "quantize": (["v4.b32"], [code, "b8"]),
        "fake_quantize": (["v4.b32"], ["v4.b32"]),
        "dequantize": ([code, "b8"], ["v4.b32"]),
    }[kernel]
    assert sorted(loads) == sorted(want_loads * gpu._STEPS)
    assert sorted(stores) == sorted(want_stores * gpu._STEPS)
    assert not re.search(r"\b(ld|st)\.shared", ptx)
    assert ".ftz" not in ptx
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    assert stack == 0  # nothing spilled
    assert registers <= 64  # at least 1024 threads on a multiprocessor of 65536 registers
