"""A CPU as a verl platform: what verl 0.9.1 asks of a device, answered for a machine without an accelerator."""

import types
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase

from verl_aqn.preflight.peak import peak_bytes
from verl_aqn.runs import host


def _peak_bytes(*_args: Any) -> int:
    """Peak resident memory of this process in bytes: the CPU's equal of `max_memory_allocated`."""
    return peak_bytes()


def _free_and_total() -> tuple[int, int]:
    """Bytes of memory free and in all: the CPU's equal of `mem_get_info`."""
    memory = host.memory()
    return memory.available, memory.total


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


# torch.cpu lacks the memory functions of torch.cuda that verl calls on every device.
_device = types.ModuleType("verl_aqn.cpu_device")
_device.__dict__.update(
    is_available=lambda: True,
    current_device=lambda: "cpu",
    device_count=lambda: 1,
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    ipc_collect=_nothing,
    reset_peak_memory_stats=_nothing,
    max_memory_allocated=_peak_bytes,
    max_memory_reserved=_peak_bytes,
    get_device_name=lambda *_args: "CPU",
    memory_allocated=_peak_bytes,
    memory_reserved=_peak_bytes,
    mem_get_info=_free_and_total,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)


def accept_one_backend() -> None:
    """Make verl open its process group with the one backend that a CPU has.

    verl names a backend for "cpu" and one for its device; where both are the CPU torch refuses ("Duplicate device type
    cpu in backend string"). To be called before verl's workers are imported, which take the function by its name.
    """
    from verl.utils import distributed

    initialize = distributed.initialize_global_process_group_ray

    def initialize_with_gloo(timeout_second: int | None = None, backend: str | None = None) -> None:
        initialize(timeout_second, backend or "gloo")

    distributed.initialize_global_process_group_ray = initialize_with_gloo


class PlatformCPU(PlatformBase):
    """Chosen by `VERL_PLATFORM=cpu`; see `PlatformBase` for the meaning of each method."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _device

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never detected, only asked for: on a GPU box the GPU is meant

    def current_device(self) -> Any:
        return "cpu"  # verl passes this to Tensor.to(); an index would mean an accelerator

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "VERL_AQN_CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"  # verl places workers by GPU or NPU only; the cpu profile declares a pretended one

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # selects shared memory for the adapter's way to the rollout

    def cudart(self) -> Any:
        return None
