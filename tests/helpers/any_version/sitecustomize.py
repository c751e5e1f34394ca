"""Let every process with this folder in PYTHONPATH run with versions of verl, vLLM, torch and Ray not admitted yet."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

EVERY = {
    "verl_aqn.integrations.verl.verl_plugin": {"SUPPORTED": dict.fromkeys(("verl", "torch", "ray"), ("",))},
    "verl_aqn.integrations.vllm.vllm_plugin": {"SUPPORTED_VLLM": ("",)},
}


class Admit(MetaPathFinder):
    """Sets the names in `EVERY` when one of its modules has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in EVERY else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            vars(module).update(EVERY[name])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Admit())
