"""Peak memory of a process, as the kernel counts it."""

from pathlib import Path


def peak_bytes() -> int:
    """The most memory that this process has had resident (VmHWM), in bytes, pages of files included.

    Not `getrusage`'s maximum: that of a process started by a large one begins with the large one's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def memory_peak() -> dict[str, int]:
    """`peak_bytes` as `resident`; on an accelerator also what torch's allocator has held of it, as `device`."""
    import torch

    found = {"resident": peak_bytes()}
    if torch.accelerator.is_available():
        found["device"] = torch.accelerator.max_memory_reserved()
    return found
