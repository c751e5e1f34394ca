"""Rungs of the codec: its bits against the format's definition, its speed against a copy. Needs only torch."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from verl_aqn.mxfp4 import Mxfp4Tensor, dequantize, fake_quantize, quantize
from verl_aqn.mxfp4.codec import BLOCK, ROUNDINGS, SCALE_RULES, kernel_name
from verl_aqn.mxfp4.kernels import reference
from verl_aqn.selftest import definition
from verl_aqn.selftest.devices import synchronize
from verl_aqn.selftest.rung import Broken, Context, Reading

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SEED = 0x9E3779B97F4A7C15  # both words of the key are in use, and both are negative as int32
LARGE = (1024, 4096)
SIDE = 4096
"""Rows and columns for the speed: larger than caches."""
SLOWEST = 2.0
"""Kernels may take this many times as long as plain PyTorch on the device, because measurements have noise."""


def inputs(dtype: torch.dtype, random: int = 64) -> Tensor:
    """Return blocks [B, 32] around every tie, of every magnitude, and of all that is special, on the CPU.

    `random`: number of blocks with random magnitudes.
    """
    generator = torch.Generator().manual_seed(0)
    top = 2.0**15 if dtype == torch.float16 else 2.0**127
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7])
    step = torch.finfo(dtype).eps
    near = torch.cat([ties * (1 - step), ties, ties * (1 + step)])  # 27 values
    amax = torch.tensor([4, 5.9375, 6, 6.0625, 6.9375, 7, 7.0625, 7.9375])
    tie_blocks = torch.cat([amax[:, None], near.expand(8, 27).minimum(amax[:, None]), torch.zeros(8, 4)], dim=1)
    tie_blocks = torch.cat([tie_blocks * 2.0**e for e in (-14, -3, 0, 12)])
    spread = torch.randn(random, 32, generator=generator)
    spread = spread * torch.exp2(torch.randint(-20, 1, (random, 32), generator=generator))
    spread = spread * torch.exp2(torch.randint(-120, 120, (random, 1), generator=generator).float())
    tiny = torch.randint(0, 0x02000000, (random // 4, 32), generator=generator, dtype=torch.int32).view(torch.float32)
    x = torch.cat([tie_blocks, spread, tiny, torch.randn(2 * random, 32, generator=generator)])
    x = x * torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1, 1)
    special = torch.ones(8, 32)
    special[0], special[1] = 0, -0.0
    special[2, 3], special[3, 31], special[4, 0] = float("nan"), float("inf"), float("-inf")
    special[5], special[6], special[7] = top, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    return torch.cat([x, special]).to(dtype)


def bits(context: Context) -> Reading:
    """Compare the codec on the device with the definition, and on many blocks with plain PyTorch on the CPU."""
    compared = 0
    for dtype in DTYPES:
        x = inputs(dtype)
        blocks = x.float().tolist()
        for rule in SCALE_RULES:
            for rounding in ROUNDINGS:
                want = _tensors(*definition.quantize(blocks, rule, rounding, SEED))
                got = quantize(x.to(context.device), rule, rounding, SEED)
                where = f"{rule}/{rounding} of {str(dtype).removeprefix('torch.')}"
                _same_bytes(got, want, f"quantise {where}")
                fake = fake_quantize(x.to(context.device), rule, rounding, SEED)
                _same_values(fake, _values(want, dtype), f"fake-quantise {where}")
                compared += len(x)
    for dtype in DTYPES:
        _every_pair_of_bytes(context.device, dtype)
    compared += _many_blocks(context.device)
    kernels = {str(d).removeprefix("torch."): kernel_name(context.device, d) for d in DTYPES}
    return Reading(
        f"{compared:,} blocks equal to the last bit; kernels: {', '.join(sorted(set(kernels.values())))}",
        {"blocks": compared, "kernels": kernels},
    )


def _every_pair_of_bytes(device: str, dtype: torch.dtype) -> None:
    """Dequantise all 256 bytes of codes under all 256 scale bytes."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).reshape(4096, 16)
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(16).view(-1, 1)
    table = torch.tensor([[definition.value(code, byte) for code in range(16)] for byte in range(256)]).double()
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(4096, 32).long()
    want = table[scale.long().view(-1, 1), nibbles]
    _same_values(dequantize(codes.to(device), scale.to(device), dtype), want.to(dtype), f"dequantise to {dtype}")


def _many_blocks(device: str) -> int:
    """Compare every finite bfloat16 value and a large Gaussian matrix with plain PyTorch on the CPU; return blocks."""
    pattern = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = pattern[pattern.isfinite()]
    gaussian = torch.randn(LARGE, generator=torch.Generator().manual_seed(1)).bfloat16()
    x = torch.cat([finite.view(-1, BLOCK), finite.view(BLOCK, -1).t(), gaussian.view(-1, BLOCK)]).contiguous()
    on_device = x.to(device)
    for rule in SCALE_RULES:
        want = _empty(x)
        reference.quantize(x, rule, "nearest", 0, want.packed, want.scale.view(-1))
        got = quantize(on_device, rule)
        _same_bytes(got, want, f"quantise {len(x):,} blocks by {rule}")
        plain = torch.empty_like(x)
        reference.dequantize(want.packed, want.scale.view(-1), plain)
        _same_values(dequantize(*got), plain, f"dequantise {len(x):,} blocks by {rule}")
    return len(SCALE_RULES) * len(x)


def speed(context: Context) -> Reading:
    """Measure the codec beside a copy on the device of as many bytes, and beside plain PyTorch."""
    side = SIDE
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(context.device, torch.bfloat16)
    codes, out = quantize(x), torch.empty_like(x)
    moved = x.nbytes + codes.packed.nbytes + codes.scale.nbytes
    # Ones, because untouched memory and zeros may be one page for all.
    a, b = (torch.ones(moved // 2, dtype=torch.uint8, device=x.device) for _ in range(2))
    blocks, plain = x.view(-1, BLOCK), _empty(x.view(-1, BLOCK))
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: _copy(a, b),
        "quantise": lambda: quantize(x, "even", out=codes),
        "dequantise": lambda: dequantize(codes.packed, codes.scale, x.dtype, out=out),
        "plain quantise": lambda: reference.quantize(blocks, "even", "nearest", 0, plain.packed, plain.scale.view(-1)),
        "plain dequantise": lambda: reference.dequantize(plain.packed, plain.scale.view(-1), out.view(-1, BLOCK)),
    }
    seconds = {name: seconds_of(run, context.device) for name, run in runs.items()}
    figures: dict[str, float] = {"copy_gbytes_per_s": moved / 1e9 / seconds["copy"]}
    for name in ("quantise", "dequantise"):
        figures[f"{name}_of_copy"] = seconds["copy"] / seconds[name]
        figures[f"{name}_of_plain"] = seconds[f"plain {name}"] / seconds[name]
        if seconds[name] > SLOWEST * seconds[f"plain {name}"]:
            raise Broken(
                f"{name} takes {1e3 * seconds[name]:.3g} ms for a {side} × {side} matrix, and plain PyTorch on the "
                f"same device {1e3 * seconds[f'plain {name}']:.3g} ms"
            )
    return Reading(
        f"copy {figures['copy_gbytes_per_s']:.3g} GB/s; quantise {figures['quantise_of_copy']:.2f} and dequantise "
        f"{figures['dequantise_of_copy']:.2f} of it; {figures['quantise_of_plain']:.1f} and "
        f"{figures['dequantise_of_plain']:.1f} times plain PyTorch",
        figures,
    )


def _copy(a: Tensor, b: Tensor) -> None:
    """Copy `a` to `b`; on a CPU with one thread, because torch waits for all of its threads, also on busy cores."""
    threads = torch.get_num_threads()
    if a.device.type == "cpu":
        torch.set_num_threads(1)
    b.copy_(a)
    if a.device.type == "cpu":
        torch.set_num_threads(threads)


def seconds_of(run: Callable[[], object], device: str, rounds: int = 5, at_least_s: float = 0.3) -> float:
    """Return the shortest of `rounds` times or more, because other work on the machine only makes them longer."""
    run()  # warms up
    times: list[float] = []
    while len(times) < rounds or sum(times) < at_least_s:
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _empty(x: Tensor) -> Mxfp4Tensor:
    """Return unset bytes for blocks `x` [B, 32]."""
    return Mxfp4Tensor(*(torch.empty(len(x), n, dtype=torch.uint8, device=x.device) for n in (BLOCK // 2, 1)))


def _tensors(packed: list[list[int]], scales: list[int]) -> Mxfp4Tensor:
    return Mxfp4Tensor(torch.tensor(packed, dtype=torch.uint8), torch.tensor(scales, dtype=torch.uint8).view(-1, 1))


def _values(codes: Mxfp4Tensor, dtype: torch.dtype) -> Tensor:
    rows = zip(codes.packed.tolist(), codes.scale.view(-1).tolist(), strict=True)
    return torch.tensor([definition.values(*row) for row in rows], dtype=torch.float64).to(dtype)


def _same_bytes(got: Mxfp4Tensor, want: Mxfp4Tensor, what: str) -> None:
    for name, one, other in zip(("codes", "scales"), got, want, strict=True):
        if wrong := int((one.cpu() != other).sum()):
            place = (one.cpu() != other).nonzero()[0].tolist()
            raise Broken(
                f"{what}: {wrong} of {other.numel()} bytes of the {name} differ, the first at {place}: "
                f"{int(one[tuple(place)])} instead of {int(other[tuple(place)])}"
            )


def _same_values(got: Tensor, want: Tensor, what: str) -> None:
    """Compare values, the signs of zeros, and the places of NaN."""
    got = got.cpu()
    wrong = (got != want) & ~(got.isnan() & want.isnan()) | (got.signbit() != want.signbit()) & ~want.isnan()
    if got.dtype != want.dtype or bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else ()
        raise Broken(
            f"{what}: {int(wrong.sum())} of {want.numel()} values differ; {got.dtype}"
            + (
                f", the first at {list(place)}: {float(got[place]):g} instead of {float(want[place]):g}"
                if place
                else ""
            )
        )
