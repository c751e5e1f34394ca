"""Model folders on disk: read safetensors with errors that name file and tensor, write a stream, publish whole."""

import contextlib
import json
import math
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from verl_aqn.errors import ModelError

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
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


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

    Raises:
        ModelError: there are no weights, or a file is missing, cut off or damaged; the message names file and tensor.
    """

    def __init__(self, folder: Path):
        where: dict[str, str] | None = None
        if (folder / _SINGLE).is_file():
            names = [_SINGLE]
        elif (folder / _INDEX).is_file():
            where = read_json(folder / _INDEX).get("weight_map", {})
            names = sorted(set(where.values()))
        else:
            raise ModelError(
                f"{folder} holds no weights: expected {_SINGLE} or {_INDEX}; save the model as safetensors"
            )
        self.files = [folder / name for name in names]
        self.specs: dict[str, Spec] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in self.files:
            for name, spec in _read_header(file).items():
                self.specs[name] = spec
                self._file_of[name] = file
        for name, file_name in (where or {}).items():
            if self._file_of.get(name) != folder / file_name:
                raise ModelError(
                    f"{folder / file_name} lacks tensor {name}, which {_INDEX} puts there: copy the file again"
                )

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """The tensor's values, on the CPU."""
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read tensor {name} of {file} ({error}): copy the file again") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
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
        and file.name != "config.json"
        and not file.name.endswith(".index.json")
    )


def write_model(
    folder: Path, config: dict[str, Any], layout: dict[str, Spec], tensors: Iterable[tuple[str, Tensor]], source: Path
) -> None:
    """Fill ``folder`` with ``config.json``, one safetensors file of ``tensors``, and the companions of ``source``.

    ``layout`` announces every tensor beforehand, so that each can be written, and forgotten, as soon as it is made;
    they may come in any order.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in companions(source):
        shutil.copyfile(file, folder / file.name)

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wide dtypes first, so that every tensor is aligned to its own element.
    for name, spec in sorted(layout.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        end = offset + spec.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    missing = set(layout)
    with (folder / _SINGLE).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert layout[name] == (tensor.dtype, tuple(tensor.shape)), name
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(tensor_bytes(tensor))
            missing.remove(name)
    assert not missing, missing


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values in row-major order, as they lie in a safetensors file."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of ``target`` that takes its name when the block ends well and disappears when it does not.

    Raises:
        ModelError: ``target`` exists, before the block or by the end of it.
    """
    taken = ModelError(f"{target} exists already: remove it or choose another folder")
    if target.exists():
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError as error:
            raise (taken if target.exists() else error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_header(file: Path) -> dict[str, Spec]:
    """Every tensor of a safetensors file, after checking that the file is long enough to hold it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise ModelError(f"cannot read {file} ({error.strerror}): copy the file again") from error
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
        specs[name] = Spec(_DTYPES[dtype], shape)
        if specs[name].nbytes != end - start:
            raise ModelError(f"tensor {name} of {file} is damaged (shape and size disagree): copy the file again")
        if 8 + length + end > size:
            raise ModelError(
                f"{file} is cut off in tensor {name} ({size} bytes, at least {8 + length + end} expected): "
                "copy the file again"
            )
    return specs
