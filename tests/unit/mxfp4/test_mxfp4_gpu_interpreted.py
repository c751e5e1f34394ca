"""The GPU tests under Triton's interpreter, in a separate process, because triton reads the variable at import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers import mxfp4_definition as definition

ROOT = Path(__file__).parents[3]


def test_gpu_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_mxfp4_gpu.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout), done.stdout


def test_philox_known_answers() -> None:
    """Random123's known-answer vectors for philox4x32-10 (tests/kat_vectors of its repository)."""
    ones = 0xFFFFFFFF
    for counter, key, want in [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        assert definition.philox(np.array([counter], dtype=np.uint64).T, *key)[:, 0].tolist() == want


def test_definition_of_stochastic_rounding_has_no_bias() -> None:
    y = np.full(1 << 20, 2.3)
    codes = definition.round_codes(y, "stochastic", definition.uniform(y.size, 5))
    assert abs(definition.GRID[codes].mean() - 2.3) < 5 * np.sqrt(0.3 * 0.7 / y.size)
