"""Read Hugging Face model folders: safetensors one tensor at a time, with errors that name file and tensor.

Values are read with plain file reads, not through a memory map: mapped pages stay in the process's resident memory
until the file is closed, so a pass over a model would look, and to a container's limit may be, as large as the model.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_aqn.checkpoints.checksums import FILE as CHECKSUMS
from verl_aqn.errors import ModelError, reason, remedy

# The names that safetensors gives to the dtypes that a model's weights come in.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def has_weights(folder: Path) -> bool:
    """Return whether `Weights` finds files in ``folder``."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


class Spec(NamedTuple):
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of a Hugging Face folder, in one safetensors file or in shards; values are read one at a time.

    ``specs`` maps every tensor's name to its dtype and shape, ``files`` lists what the folder's weights are read from.
    Set ``device`` to ``meta`` to get tensors without values, where only the structure matters.

    Raises:
        ModelError: there are no weights, or a file is missing, cut off or damaged; the message names file and tensor.
    """

    def __init__(self, folder: Path):
        where: dict[str, str] | None = None
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        elif (folder / INDEX).is_file():
            where = read_json(folder / INDEX).get("weight_map", {})
            names = sorted(set(where.values()))
        else:
            raise ModelError(f"{folder} holds no weights: expected {SINGLE} or {INDEX}; save the model as safetensors")
        self.device = "cpu"
        self.files = [folder / name for name in names]
        self.specs: dict[str, Spec] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        for file in self.files:
            for name, (spec, offset) in _read_header(file).items():
                self.specs[name] = spec
                self._place[name] = (file, offset)
        for name, file_name in (where or {}).items():
            if name not in self._place or self.file_of(name) != folder / file_name:
                raise ModelError(
                    f"{folder / file_name} lacks tensor {name}, which {INDEX} puts there: copy the file again"
                )

    def file_of(self, name: str) -> Path:
        return self._place[name][0]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor's values on the CPU, or those of its part ``[index]`` along the first dimension."""
        file, offset = self._place[name]
        spec = self.specs[name]
        if index is not None:
            spec = spec._replace(shape=spec.shape[1:])
            offset += index * spec.nbytes
        if self.device == "meta":
            return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        try:
            with file.open("rb", buffering=0) as stream:
                stream.seek(offset)
                _fill(stream, tensor.view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            todo = remedy(error) or "copy the file again"
            raise ModelError(f"cannot read tensor {name} of {file} ({reason(error)}): {todo}") from error
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's or a checkpoint's folder; ModelError where the file does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path} ({reason(error)}): {remedy(error) or 'copy the file again'}") from error
    except ValueError as error:
        raise ModelError(f"cannot read {path} ({error}): copy the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object: copy the file again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as a dictionary; ModelError where ``folder`` is no Hugging Face model folder."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: give the path of a downloaded Hugging Face model")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    return read_json(folder / "config.json")


def companions(folder: Path) -> list[Path]:
    """The files that a rewritten model takes along as they are: tokenizer, chat template, licence and so on."""
    keep = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and (file.suffix in keep or file.name.upper().startswith(("LICENSE", "NOTICE")))
        and file.name not in ("config.json", CHECKSUMS)
        and not file.name.endswith(".index.json")
    )


def _fill(stream: Any, buffer: memoryview) -> None:
    """Read until ``buffer`` is full: one read gives at most 2 GiB. Raises OSError at an early end of the file."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise OSError("it became shorter while it was read")
        done += count


def _read_header(file: Path) -> dict[str, tuple[Spec, int]]:
    """(spec, offset in bytes) of every tensor of a safetensors file, once it is known to be long enough for them."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise ModelError(f"cannot read {file} ({reason(error)}): {remedy(error) or 'copy the file again'}") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not a safetensors file, or its header is cut off: copy the file again") from error

    specs = {}
    for name, dtype, shape, start, end in sorted(entries, key=lambda entry: entry[3]):
        if dtype not in _DTYPES:
            raise ModelError(f"tensor {name} of {file} has dtype {dtype}: start from bf16, fp16 or fp32 weights")
        spec = Spec(_DTYPES[dtype], shape)
        specs[name] = (spec, 8 + length + start)
        if spec.nbytes != end - start:
            raise ModelError(f"tensor {name} of {file} is damaged (shape and size disagree): copy the file again")
        if 8 + length + end > size:
            raise ModelError(
                f"{file} is cut off in tensor {name} ({size} bytes, at least {8 + length + end} expected): "
                "copy the file again"
            )
    return specs
