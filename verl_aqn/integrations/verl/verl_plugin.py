"""The plugin that verl imports in the driver and in every Ray worker (entry point `verl.plugins`).

verl ignores errors during this import (it logs them at DEBUG). Therefore no code relies on the import: each process
calls `assert_loaded`, which stops it with a plain message if something is missing.
"""

import importlib.metadata
import os
from collections.abc import Iterable

from verl.plugin.platform import get_platform
from verl.plugin.platform.platform_manager import PlatformRegistry

from verl_aqn.errors import EnvironmentFault
from verl_aqn.integrations.verl.platform_cpu import PlatformCPU, accept_one_backend
from verl_aqn.integrations.verl.root_cause import note_task_errors
from verl_aqn.runs.faults import watch
from verl_aqn.runs.stacks import FOLDER, listen

# torch 2.10 is the NPU's, 2.11 that of verl's own extra `vllm`, 2.13 the CPU's and the GPU's. CONTRIBUTING.md says why
# verl 0.9.0 is not here.
SUPPORTED = {"verl": ("0.9.1",), "torch": ("2.10.", "2.11.", "2.13."), "ray": ("2.60.",)}

if PlatformRegistry.get("cpu") is None:
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
if os.environ.get("VERL_PLATFORM", "").lower() == "cpu":
    accept_one_backend()
listen()
watch()
note_task_errors()
if FOLDER in os.environ:  # not in a stock run, where other nodes may lack this package
    from verl_aqn.integrations.verl.queue import guard

    guard()


def check_versions(names: Iterable[str] = tuple(SUPPORTED)) -> dict[str, str]:
    """Return the versions of the packages in `names`, by default of all in `SUPPORTED`.

    Raises:
        EnvironmentFault: a version is not among those in `SUPPORTED`.
    """
    versions = {name: importlib.metadata.version(name) for name in names}
    for name, version in versions.items():
        if not version.startswith(SUPPORTED[name]):
            wanted = ", ".join(SUPPORTED[name])
            raise EnvironmentFault(f"{name} {version} is not supported (supported: {wanted}); run scripts/setup.sh")
    return versions


def assert_loaded(process: str) -> None:
    """Stop this process unless the plugin is loaded and verl uses the requested platform.

    Args:
        process: name of the process, for the message.

    Raises:
        EnvironmentFault: the plugin is not loaded, or the platform is another one.
    """
    check_versions()
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if policy != "auto" and "verl_aqn" not in policy.split(","):
        raise EnvironmentFault(f"{process}: VERL_USE_EXTERNAL_PLUGINS={policy} excludes verl-aqn: unset it")
    if not importlib.metadata.entry_points(group="verl.plugins", name="verl_aqn"):
        raise EnvironmentFault(f"{process}: verl-aqn's entry points are not installed: run `bash scripts/setup.sh`")
    wanted = os.environ.get("VERL_PLATFORM", "").lower()
    if wanted == "cpu" and PlatformRegistry.get("cpu") is not PlatformCPU:
        raise EnvironmentFault(
            f"{process}: another package has registered a cpu platform with verl: uninstall that package"
        )
    platform = get_platform()
    if wanted == "cpu" and platform.device_name != "cpu":
        raise EnvironmentFault(f"{process}: verl chose platform {platform.device_name} before the plugin was loaded")
