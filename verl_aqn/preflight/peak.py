"""Measure the peak memory of a process, as the kernel counts it."""

from pathlib import Path


def peak_bytes() -> int:
    """Return this process's maximum resident memory (VmHWM) in bytes, including pages of files.

    `getrusage` is not used: for a process started by a large process, its maximum begins with the value of the large
    one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def memory_peak() -> dict[str, int]:
    """Return `peak_bytes` as `resident`; on an accelerator also the maximum of torch's allocator, as `device`."""
    import torch

    found = {"resident": peak_bytes()}
    if torch.accelerator.is_available():
        found["device"] = torch.accelerator.max_memory_reserved()
    return found
