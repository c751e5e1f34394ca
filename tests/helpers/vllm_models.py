"""Models loaded by vLLM's own classes on a CPU and observed as in a run, without an engine around them.

`python -m tests.helpers.vllm_models FOLDER…` prints one JSON line per folder: the reply of `aqn_base`, first unchanged
and then after one value of a tensor of each group was changed. This runs in its own process, because vLLM sets up its
process only once.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from verl_aqn.checkpoints.disk_base import DiskBase
from verl_aqn.integrations.vllm import readback
from verl_aqn.integrations.vllm.tensor_digests import describe_tensors


def start(meeting: Path) -> None:
    """Create vLLM's process groups with one rank, for all models of this process."""
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment, parallel_state

    parallel_state.destroy_model_parallel()  # the groups of the last model may lack one for experts
    init_distributed_environment(1, 0, f"file://{meeting}/store", 0, backend="gloo")
    ensure_model_parallel_initialized(1, 1)


def config_of(folder: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder), load_format="safetensors", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64,
        distributed_executor_backend="mp", dtype="bfloat16",
    ).create_engine_config()  # fmt: skip


def load(folder: Path, config: Any) -> torch.nn.Module:
    """Return the model that a worker of a run has after loading: weights for its kernels, norms in float32."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    config.parallel_config.worker_extension_cls = "verl_aqn.integrations.verl.worker_extension.AqnWorkerExtension"
    loader = DefaultModelLoader(config.load_config)
    return loader.load_model(config, config.model_config).eval()


def answer(model: torch.nn.Module, modules: list[str]) -> dict[str, Any]:
    return readback.describe_base(model, modules) | describe_tensors(model, modules)


def change(model: torch.nn.Module, name: str) -> None:
    """Change one value of what the model holds of the checkpoint's tensor `name`, if it is read live."""
    loaded = readback.loaded_of(model)
    parameter = readback.parameters_of(model)(loaded.pieces[name][0].place)
    flat = parameter.view(-1)
    at = loaded.pieces[name][0].here
    flat[at] = flat[at] * 1.5 + 1


@contextmanager
def loaded_wrong(names: list[str]) -> Iterator[None]:
    """Yield models whose loader has changed one value in each of the checkpoint's tensors `names`."""
    from verl_aqn.integrations.vllm import observe

    remember = observe.remember_base

    def changed(model: torch.nn.Module) -> None:
        for name in names:
            change(model, name)
        remember(model)

    observe.remember_base = changed
    try:
        yield
    finally:
        observe.remember_base = remember


def main(folders: list[Path]) -> None:
    from vllm.config import set_current_vllm_config

    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    plugin.register()
    with TemporaryDirectory() as meeting:
        for folder in folders:
            config = config_of(folder)
            with set_current_vllm_config(config):
                start(Path(meeting))
                model = load(folder, config)
            packed = folder.parent / "packed"
            modules = [n for n, group in DiskBase(packed).groups.items() if group == "packed"]
            modules = modules if folder.name != "source" else []
            said: dict[str, Any] = {"clean": answer(model, modules), "changed": {}}
            groups, seen, unseen = DiskBase(folder).groups, set(), {}
            for name, (_, _, live, _) in said["clean"]["tensors"].items():
                group = groups.get(name)
                if live and group and group not in seen:
                    seen.add(group)
                    change(model, name)
                    said["changed"][name] = answer(model, modules)["tensors"][name][0]
                elif group and group != "packed" and not live:
                    unseen.setdefault(group, name)
            if unseen:
                with set_current_vllm_config(again := config_of(folder)), loaded_wrong(list(unseen.values())):
                    wrong = answer(load(folder, again), modules)
                said["changed"] |= {name: wrong["tensors"][name][0] for name in unseen.values()}
            print("RESULT " + json.dumps(said), flush=True)
    sys.stdout.flush()
    os._exit(0)  # otherwise vLLM's groups warn when the interpreter exits


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
