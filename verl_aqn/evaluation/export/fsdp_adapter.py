"""Reading of the adapter in a checkpoint of verl's FSDP engine: `actor/model_world_size_<W>_rank_<R>.pt`.

Every rank of verl writes a file with its part of each tensor (a DTensor). `lora_train_meta.json` has r and α. With
`save_lora_only` the files contain only the adapter; otherwise also the base, which is ignored here.
`verl_api.packed_base` adds PEFT's adapter_config.json to the folder.
"""

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
)  # this import also allows torch.load to load DTensors with weights_only

from verl_aqn.checkpoints.adapter import ADAPTER_DTYPE, Adapter, split_name, unwrapped
from verl_aqn.checkpoints.storage import read_json
from verl_aqn.errors import DataError, ModelError, first_line, reason, remedy


def read_adapter(actor: Path) -> Adapter:
    """Read the adapter of an actor's checkpoint folder; fp32 master weights are rounded to `ADAPTER_DTYPE`.

    Only tensors are loaded: a file with other objects is rejected and never unpickled.

    Raises:
        DataError: a file is missing or damaged, or its tensors do not match.
        ModelError: the checkpoint has no LoRA adapter, or one of another kind (DoRA, embeddings).
    """
    for name in ("fsdp_config.json", "lora_train_meta.json"):
        if not (actor / name).is_file():
            raise DataError(f"{actor} has no {name}: it is not a complete checkpoint of a LoRA run with verl's FSDP")
    # verl's own file has neither rsLoRA nor patterns; runs of earlier versions have only this file.
    own = actor / "adapter_config.json"
    meta = read_json(own if own.is_file() else actor / "lora_train_meta.json")
    world = int(read_json(actor / "fsdp_config.json")["world_size"])
    files = [actor / f"model_world_size_{world}_rank_{rank}.pt" for rank in range(world)]
    with _without_mesh_warning():
        states = [_load(file) for file in files]

    found: dict[str, dict[str, Tensor]] = {}
    for name in states[0]:
        if "lora_" not in name:
            continue
        module, kind = split_name(unwrapped(name))
        if kind not in ("A", "B"):
            raise ModelError(f"{files[0]} has {name}: only plain LoRA (A and B of linear layers) can be exported")
        try:
            parts = [state[name] for state in states]
        except KeyError:
            raise DataError(f"tensor {name} is not in all of the {world} files in {actor}: copy them again") from None
        found.setdefault(module, {})[kind] = _join(name, parts, actor).to(ADAPTER_DTYPE)
    if not found:
        raise ModelError(f"{files[0]} has no LoRA tensor: there is no adapter to export")
    matrices = {module: (pair.get("A"), pair.get("B")) for module, pair in sorted(found.items())}
    adapter = Adapter(
        matrices, int(meta["r"]), float(meta["lora_alpha"]), bool(meta.get("use_rslora")),  # type: ignore[arg-type]
        meta.get("rank_pattern") or {}, meta.get("alpha_pattern") or {},
    )  # fmt: skip
    for module, pair in found.items():
        rank = adapter.rank_of(module)
        if set(pair) != {"A", "B"} or {pair["A"].shape[0], pair["B"].shape[1]} != {rank}:
            shapes = {kind: list(tensor.shape) for kind, tensor in sorted(pair.items())}
            raise DataError(f"the adapter of {module} in {actor} is {shapes}, not A [r, K] and B [N, r] of r={rank}")
    return adapter


def _load(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist: the files of all ranks are needed") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{file} contains more than tensors and is not opened ({first_line(error)})") from error
    except OSError as error:
        raise DataError(f"cannot read {file} ({reason(error)}): {remedy(error) or 'copy it again'}") from error
    except (RuntimeError, EOFError) as error:
        raise DataError(f"{file} is damaged ({first_line(error)}): copy it again") from error


def _join(name: str, parts: list[Tensor], actor: Path) -> Tensor:
    """Join the parts of a tensor from all ranks."""
    first = parts[0]
    if not isinstance(first, DTensor):
        if len(parts) > 1:
            raise DataError(
                f"{actor} has plain tensors of {len(parts)} ranks: only tensors of fsdp2 (DTensor) can be joined"
            )
        return first
    sharded = [(axis, placement.dim) for axis, placement in enumerate(first.placements) if isinstance(placement, Shard)]
    known = all(isinstance(placement, (Shard, Replicate)) for placement in first.placements)
    if not known or len(sharded) > 1:
        raise DataError(
            f"tensor {name} in {actor} has the layout {first.placements}: only shards along one axis can be joined"
        )
    if not sharded:
        whole = first.to_local()
    else:
        ((axis, dim),) = sharded
        # The ranks along the sharded axis of the mesh; ranks along other axes hold the same values.
        ranks = first.device_mesh.mesh.movedim(axis, -1).reshape(-1, first.device_mesh.mesh.shape[axis])[0]
        whole = torch.cat([parts[rank].to_local() for rank in ranks.tolist()], dim)
    if whole.shape != first.shape:
        raise DataError(f"the parts of {name} in {actor} give {list(whole.shape)}, not {list(first.shape)}")
    return whole


@contextmanager
def _without_mesh_warning() -> Iterator[None]:
    """Silence torch's warning about a mesh without a process group, because none is needed here."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
