"""Reading of Hugging Face model folders: one tensor of a safetensors file at a time, with errors that name both.

Values are read with plain file reads and not through a memory map. Mapped pages stay in the resident memory of the
process until the file is closed, so that a pass over a model would seem to need as much memory as the whole model, also
for the memory limit of a container.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_aqn.checkpoints.checksums import FILE as CHECKSUMS
from verl_aqn.errors import ModelError, reason, remedy

# The names of dtypes in safetensors.
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
    """The dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of a Hugging Face folder, in one safetensors file or in shards; values are read one tensor at a time.

    ``specs`` maps every tensor's name to its dtype and shape. ``files`` lists the files of the weights. Set ``device``
    to ``meta`` to get tensors without values, if only the structure is needed.

    Raises:
        ModelError: there are no weights, or a file is missing, truncated or damaged; the message names the file and the
            tensor.
    """

    def __init__(self, folder: Path):
        where: dict[str, str] | None = None
        if (folder / SINGLE).is_file():
            names = [SINGLE]
        elif (folder / INDEX).is_file():
            where = read_json(folder / INDEX).get("weight_map", {})
            names = sorted(set(where.values()))
        else:
            raise ModelError(f"{folder} has no weights: expected {SINGLE} or {INDEX}; save the model as safetensors")
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
                    f"{folder / file_name} lacks tensor {name}, which {INDEX} lists for it: copy the file again"
                )

    def file_of(self, name: str) -> Path:
        return self._place[name][0]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read the tensor's values on the CPU, or those of its part ``[index]`` along the first dimension."""
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
    """Read a JSON object from a file of a model or checkpoint folder.

    Raises:
        ModelError: the file cannot be read or does not contain a JSON object.
    """
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
    """Read ``config.json`` as a dictionary.

    Raises:
        ModelError: ``folder`` is not a Hugging Face model folder.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: give the path of a downloaded Hugging Face model")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    return read_json(folder / "config.json")


def companions(folder: Path) -> list[Path]:
    """List the files that a rewritten model keeps unchanged: tokenizer, chat template, licence and so on."""
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
    """Read until ``buffer`` is full, because one read returns at most 2 GiB.

    Raises:
        OSError: the file ends too early.
    """
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise OSError("the file became shorter while it was read")
        done += count


def _read_header(file: Path) -> dict[str, tuple[Spec, int]]:
    """Return (spec, offset in bytes) of every tensor of a safetensors file, after checking the length of the file."""
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
        raise ModelError(
            f"{file} is not a safetensors file, or its header is truncated: copy the file again"
        ) from error

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
                f"{file} is truncated in tensor {name} ({size} bytes, at least {8 + length + end} expected): "
                "copy the file again"
            )
    return specs
