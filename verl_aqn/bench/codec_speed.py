"""`verl-aqn bench mxfp4`: the codec beside a memory copy, torchao and compressed-tensors; the linear layer beside bf16.

Each round measures all rows once, one after another, so that other load on the machine affects all of them alike.
Ratios are medians of the rounds' own ratios. With one thread on a CPU (``OMP_NUM_THREADS=1``) the times are CPU times
of this thread, which do not count the time of other processes.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer as default_timer

from verl_aqn.errors import ConfigError, first_line
from verl_aqn.mxfp4 import Mxfp4Linear, Mxfp4Tensor, dequantize, fake_quantize, quantize
from verl_aqn.mxfp4.kernels import native, reference
from verl_aqn.runs.provenance import processor

# [tokens, K, N] of a micro-batch in the largest layers of SmolLM2-135M, Qwen2.5-1.5B and Qwen2.5-7B. The last one's
# weight is larger than 32 MB: glibc returns such memory to the system at once, so every new copy has page faults.
LINEAR_SHAPES = ((1024, 576, 1536), (1024, 1536, 8960), (128, 3584, 18944))


def measure(
    device: str = "cpu", size: int = 4096, rounds: int = 7, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Return times and ratios on ``device`` for a [size, size] matrix and for the linear layers.

    The result is ``{"device", "threads", "size", "rounds", "kernels", "codec": [row], "linear": [row]}``. A row of the
    codec has ``name, dtype, gbytes`` (read and written), ``seconds`` (median), ``gbytes_per_s, of_copy`` (speed as a
    fraction of a preallocated copy of as many bytes). A peer's row also has ``ours_times_as_fast`` (its time divided by
    ours for the same work).

    Raises:
        ConfigError: an unknown device, or a size that is not a multiple of 32.
    """
    if size % 32 or size < 32:
        raise ConfigError(f"--size {size} is not a multiple of 32")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {first_line(error)}") from error
    codec = list(_codec_rows(device, size))
    linear = list(_linear_rows(device))
    for n in range(rounds + 1):
        for row in (*codec, *linear):
            seconds = row["timer"].timeit(1).median
            if n:  # the first round warms up
                row["times"].append(seconds)
        if progress is not None:
            progress(n, rounds)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "size": size,
        "rounds": rounds,
        "kernels": "native" if native.available() else native.status().detail,
        "codec": _codec_report(codec),
        "linear": _linear_report(linear),
    }


def _codec_rows(device: str, size: int) -> Iterator[dict[str, Any]]:
    n = size * size
    packed_bytes = n // 2 + n // 32
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        out, codes = torch.empty_like(x), quantize(x)
        short = str(dtype).removeprefix("torch.")

        def row(name: str, nbytes: int, run: Callable, short: str = short, **more: Any) -> dict[str, Any]:
            return _row(device, run, name=name, dtype=short, bytes=nbytes, **more)

        both, half = 2 * x.nbytes, x.nbytes + packed_bytes
        for nbytes in (both, half):
            # Written before they are read: pages that nobody wrote are all the same page of zeros, in the cache.
            a, b = (torch.full((nbytes // 2,), 1, dtype=torch.uint8, device=device) for _ in range(2))
            yield row(f"copy of {nbytes / 2e6:,.0f} MB", nbytes, lambda a=a, b=b: b.copy_(a))
        for rule, suffix in (("even", ""), ("mse", ", mse")):
            yield row("fake-quantise" + suffix, both, lambda x=x, o=out, r=rule: fake_quantize(x, r, out=o))
            yield row("quantise" + suffix, half, lambda x=x, c=codes, r=rule: quantize(x, r, out=c))
        yield row("dequantise", half, lambda c=codes, o=out: dequantize(c.packed, c.scale, o.dtype, out=o))
        roundtrip = row("quantise + dequantise", 2 * half, lambda x=x, c=codes, o=out: _roundtrip(x, c, o))
        yield roundtrip
        if device == "cpu":
            yield row("… in plain PyTorch", 2 * half, lambda x=x, c=codes, o=out: _plain_roundtrip(x, c, o))
        for name, peer in _peers():
            yield row(name, 2 * half, lambda x=x, f=peer: f(x), peer_of=roundtrip)


def _linear_rows(device: str) -> Iterator[dict[str, Any]]:
    for tokens, k, n in LINEAR_SHAPES:
        torch.manual_seed(0)
        dense = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
        packed, kept = Mxfp4Linear.from_linear(dense), Mxfp4Linear.from_linear(dense)
        kept.cache_dequantized = True
        x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
        nbytes = [dense.weight.nbytes, sum(p.nbytes for p in packed.parameters())]
        nbytes.append(sum(nbytes))
        names, layers = ("bf16", "packed", "packed, cache_dequantized"), (dense, packed, kept)
        for name, layer, size in zip(names, layers, nbytes, strict=True):
            yield _row(
                device,
                lambda f=layer, x=x, g=grad: torch.autograd.grad(f(x), x, g),
                name=name,
                shape=[tokens, k, n],
                weight_bytes=size,
            )


def _row(device: str, run: Callable, **fields: Any) -> dict[str, Any]:
    threads = torch.get_num_threads()
    clock = time.thread_time if device == "cpu" and threads == 1 else default_timer
    timer = Timer("run()", timer=clock, globals={"run": run}, num_threads=threads)
    return {**fields, "timer": timer, "times": []}


def _roundtrip(x: Tensor, codes: Mxfp4Tensor, out: Tensor) -> None:
    quantize(x, "even", out=codes)
    dequantize(codes.packed, codes.scale, out.dtype, out=out)


def _plain_roundtrip(x: Tensor, codes: Mxfp4Tensor, out: Tensor) -> None:
    packed, scale = codes.packed.view(-1, 16), codes.scale.view(-1)
    reference.quantize(x.view(-1, 32), "even", "nearest", 0, packed, scale)
    reference.dequantize(packed, scale, out.view(-1, 32))


def _peers() -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """Yield quantise-and-dequantise functions of other libraries; those that are not installed are left out."""
    # It is installed outside the environment; otherwise PEFT would import it into every process (scripts/setup.sh).
    sys.path.append(str(Path(sys.prefix) / "oracles"))
    for chatty in ("torchao", "torch.utils._pytree"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
    except ImportError:
        pass
    else:

        def torchao(x: Tensor) -> Tensor:
            scale, packed = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)
            return to_dtype(packed, scale, torch.float4_e2m1fn_x2, 32, x.dtype)

        yield "… by torchao", torchao
    finally:
        sys.path.pop()
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype="torch.uint8"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def compressed_tensors(x: Tensor) -> Tensor:
        amax = x.view(x.shape[0], -1, 32).abs().amax(-1)
        scale, _ = calculate_qparams(-amax, amax, args)
        compressed = MXFP4PackedCompressor.compress({"weight": x, "weight_scale": scale}, scheme)
        return MXFP4PackedCompressor.decompress(compressed, scheme)["weight"]

    yield "… by compressed-tensors", compressed_tensors


def _codec_report(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    copies = {(row["dtype"], row["bytes"]): row["times"] for row in rows if row["name"].startswith("copy")}
    report = []
    for row in rows:
        # A round trip moves the bytes of both halves.
        parts = 1 if (row["dtype"], row["bytes"]) in copies else 2
        copy = copies[row["dtype"], row["bytes"] // parts]
        seconds = median(row["times"])
        entry = {
            "name": row["name"],
            "dtype": row["dtype"],
            "gbytes": row["bytes"] / 1e9,
            "seconds": seconds,
            "gbytes_per_s": row["bytes"] / 1e9 / seconds,
            "of_copy": median(parts * c / t for c, t in zip(copy, row["times"], strict=True)),
        }
        if ours := row.get("peer_of"):
            entry["ours_times_as_fast"] = median(t / o for t, o in zip(row["times"], ours["times"], strict=True))
        report.append(entry)
    return report


def _linear_report(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dense = {tuple(row["shape"]): row for row in rows if row["name"] == "bf16"}
    return [
        {
            "name": row["name"],
            "shape": row["shape"],
            "seconds": median(row["times"]),
            "time_of_bf16": median(
                t / d for t, d in zip(row["times"], dense[tuple(row["shape"])]["times"], strict=True)
            ),
            "weight_bytes": row["weight_bytes"],
            "bytes_of_bf16": row["weight_bytes"] / dense[tuple(row["shape"])]["weight_bytes"],
        }
        for row in rows
    ]


def device_name(device: str) -> str:
    """Return the name of the measured device: the GPU's or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor() if device == "cpu" else device
