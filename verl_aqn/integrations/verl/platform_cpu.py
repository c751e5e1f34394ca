"""A verl platform for CPUs: the device functions that verl 0.9.1 calls, for a machine without an accelerator."""

import types
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase

from verl_aqn.preflight.peak import peak_bytes
from verl_aqn.runs import host


def _peak_bytes(*_args: Any) -> int:
    """Return the peak resident memory of this process in bytes, as `max_memory_allocated` does for a GPU."""
    return peak_bytes()


def _free_and_total() -> tuple[int, int]:
    """Return the free and the total memory in bytes, as `mem_get_info` does for a GPU."""
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
    """Make verl open its process group with gloo, the only backend for a CPU.

    verl names one backend for "cpu" and one for its device. If both are the CPU, torch raises "Duplicate device type
    cpu in backend string". Call this before verl's workers are imported, because they import the function by name.
    """
    from verl.utils import distributed

    initialize = distributed.initialize_global_process_group_ray

    def initialize_with_gloo(timeout_second: int | None = None, backend: str | None = None) -> None:
        initialize(timeout_second, backend or "gloo")

    distributed.initialize_global_process_group_ray = initialize_with_gloo


class PlatformCPU(PlatformBase):
    """The platform that `VERL_PLATFORM=cpu` selects; see `PlatformBase` for the meaning of each method."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _device

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # the CPU must be selected explicitly, so that a machine with a GPU uses its GPU

    def current_device(self) -> Any:
        return "cpu"  # verl passes this to Tensor.to(); an index would select an accelerator

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
        return "GPU"  # verl places workers only by GPU or NPU; the cpu profile declares a virtual GPU

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # then the adapter is sent to the rollout through shared memory

    def cudart(self) -> Any:
        return None
