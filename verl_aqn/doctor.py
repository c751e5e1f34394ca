"""`verl-aqn doctor`: is everything in place that a run needs?"""

import importlib.metadata
import subprocess
import sys

import psutil

from verl_aqn.config import detect_profile
from verl_aqn.mxfp4.kernels import native

# Each check runs in a process of its own, because what matters is what a *new* process sees.
_PROBES = {
    "verl plugin": "import verl; from verl.plugin.platform.platform_manager import PlatformRegistry as R; "
    "assert R.get('cpu') is not None, 'verl did not load the verl-aqn entry point'; "
    "from verl_aqn.verl_api.plugin import check_versions as c; print(', '.join(f'{k} {v}' for k, v in c().items()))",
    "vLLM plugin": "from vllm.plugins import load_general_plugins as load; load(); "
    "from verl_aqn.vllm_api import plugin as p; assert p.is_registered(), 'vLLM did not call the verl-aqn plugin'; "
    "print('vllm', p.check_version())",
}


def examine() -> tuple[int, list[dict]]:
    """Number of faults, and rows of `{"what", "found", "fix"}` (fix is empty where all is well)."""
    rows = [
        {"what": "Python", "found": sys.version.split()[0], "fix": ""},
        {"what": "profile", "found": detect_profile(), "fix": ""},
        {"what": "memory free", "found": f"{psutil.virtual_memory().available / 1e9:.1f} GB", "fix": ""},
    ]
    kernels = native.status()
    found = "compiled" if kernels.available else f"plain PyTorch, several times slower: {kernels.detail}"
    rows.append({"what": "MXFP4 on CPU", "found": found, "fix": ""})
    for package in ("verl-aqn", "verl", "vllm", "torch", "ray", "transformers", "peft", "compressed-tensors"):
        try:
            rows.append({"what": package, "found": importlib.metadata.version(package), "fix": ""})
        except importlib.metadata.PackageNotFoundError:
            rows.append({"what": package, "found": "missing", "fix": "bash scripts/setup.sh"})
    for what, code in _PROBES.items():
        probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        lines = (probe.stdout if probe.returncode == 0 else probe.stderr).strip().splitlines()
        rows.append(
            {
                "what": what,
                "found": lines[-1] if lines else "no answer",
                "fix": "" if probe.returncode == 0 else "bash scripts/setup.sh",
            }
        )
    return sum(bool(row["fix"]) for row in rows), rows
