"""N(0, 1) as a pure function of (seed, step, name, index of the element), with the same bits in every process.

The random words are the raw output of Philox4x64-10 (Salmon et al. 2011, numpy's implementation), which numpy
guarantees to keep (NEP 19). The key is blake2b(seed, step, name), and the counter is the index. numpy's own normal
numbers are not used: they consume a varying number of words, so that no slice could be drawn separately, and their
method may change.

Each element uses 32 bits: a sign and 31 bits m, with tail probability p = (2m + 1) / 2^33. |z| = -Φ⁻¹(p) is read from
a table with 256 linear pieces per octave of p (within 2e-6 of the exact value, up to |z| = 6.3). With the table, only
integer operations, one product and one difference in float32 are needed, which IEEE 754 rounds in the same way on every
machine. The table itself is checked by its digest.
"""

import functools
import hashlib
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from verl_aqn.errors import EnvironmentFault

_OCTAVES, _BITS = 32, 8  # 2^8 pieces per octave, selected by the upper bits of the 23-bit mantissa of float32
_TABLE_SHA256 = "4920865fcd7d83613cd2ed293530176a651e57181741be40ab26058f1d41e203"
_CHUNK = 1 << 15  # elements per chunk; intermediate arrays then stay in the cache


class Span(NamedTuple):
    """`numel` elements of the noise of parameter `name`, from index `offset` on."""

    name: str
    offset: int
    numel: int


def draw(seed: int, step: int, name: str, numel: int, offset: int = 0) -> torch.Tensor:
    """Draw the elements offset … offset + numel - 1 of the noise of `name`: float32 [numel] on the CPU."""
    return draw_spans(seed, step, [Span(name, offset, numel)])


def draw_spans(seed: int, step: int, spans: Sequence[Span]) -> torch.Tensor:
    """Draw the noise of all `spans`, concatenated: float32 [sum of numel] on the CPU.

    One call is faster than many calls of `draw`.
    """
    words = np.empty(sum(span.numel for span in spans), np.uint32)
    philox = np.random.Philox(key=0)
    state = philox.state
    key, begin = b"", 0
    for number, (name, offset, numel) in enumerate(spans):
        if number == 0 or name != spans[number - 1].name:
            key = hashlib.blake2b(f"{seed}\0{step}\0{name}".encode(), digest_size=16).digest()
        block, skip = divmod(offset, 8)  # the counter counts blocks of four words of 64 bits
        state["state"]["key"] = np.frombuffer(key, "<u8")
        state["state"]["counter"] = np.array([block, 0, 0, 0], np.uint64)
        philox.state = state
        raw = philox.random_raw((skip + numel + 1) // 2).astype("<u8", copy=False)
        words[begin : begin + numel] = raw.view("<u4")[skip : skip + numel]
        begin += numel
    out = np.empty(words.size, np.float32)
    for at in range(0, words.size, _CHUNK):
        out[at : at + _CHUNK] = normal(words[at : at + _CHUNK])
    return torch.from_numpy(out)


def normal(words: np.ndarray) -> np.ndarray:
    """Convert uniform uint32 words to N(0, 1) in float32, element by element."""
    knots, slopes = _table()
    # 2m + 1 as float32 (rounded to nearest): the exponent and the upper mantissa bits select the piece, the lower
    # mantissa bits are the position within the piece.
    bits = ((words << np.uint32(1)) | np.uint32(1)).astype(np.float32).view(np.uint32)
    piece = (bits >> np.uint32(23 - _BITS)).astype(np.intp)
    piece -= 127 << _BITS  # the exponent's bias
    place = (bits & np.uint32(2 ** (23 - _BITS) - 1)).astype(np.float32)
    place *= slopes.take(piece)
    z = knots.take(piece)
    z -= place
    signed = z.view(np.uint32)
    signed ^= words & np.uint32(1 << 31)
    return z


@functools.cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return |z| at the start of each piece, a multiple of 2^-20, and its decrease per mantissa unit; float32 [8193].

    Raises:
        EnvironmentFault: the logarithm and square root of this machine give another table.
    """
    inverse = NormalDist().inv_cdf
    exact = [-inverse(2.0 ** (e - 33) * (1 + k / 2**_BITS)) for e in range(_OCTAVES) for k in range(2**_BITS)]
    # Rounded so coarsely that last-bit differences between machines vanish; exact in float32, as are the differences.
    knots = (np.rint(np.array([*exact, 0.0]) * 2**20) / 2**20).astype(np.float32)
    slopes = np.append(knots[:-1] - knots[1:], np.float32(0)) / np.float32(2 ** (23 - _BITS))
    if hashlib.sha256(knots.astype("<f4").tobytes()).hexdigest() != _TABLE_SHA256:
        raise EnvironmentFault(
            "the table of normal quantiles differs from that of other machines, so that noise would differ between "
            "processes: this platform's libm is not supported"
        )
    return knots, slopes
