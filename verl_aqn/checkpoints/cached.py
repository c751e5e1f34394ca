"""Packed checkpoints and their equals in other forms: made once, found again by a digest of what they are of.

A folder that is found again is held against what was recorded when it was made (`check_made`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from verl_aqn.checkpoints.checksums import check_checksums, known_digest
from verl_aqn.checkpoints.error_report import FILE
from verl_aqn.checkpoints.foreign import foreign_layout, import_checkpoint
from verl_aqn.checkpoints.loading import dequantize_checkpoint
from verl_aqn.checkpoints.packing import EXCLUDE, checkpoint_digest, is_packed, quantize_checkpoint
from verl_aqn.checkpoints.storage import Weights, companions, read_config, read_json
from verl_aqn.errors import DataError, ModelError

# Part of the key: raise it when the same source would give another packed folder.
_FORMAT_VERSION = 3


def quantized_cache(
    src: str | Path,
    cache_dir: str | Path,
    scale_rule: str = "mse",
    exclude: Iterable[str] = EXCLUDE,
    calibrate: Iterable[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """The packed folder of ``src`` under ``cache_dir``, made where it is not there yet.

    A source that is MXFP4 in another tool's layout keeps its codes, whatever the arguments say about rounding.
    With ``calibrate`` (texts as `verl_aqn.checkpoints.calibrate.calibration_ids` takes them) rounding is error-compensated.
    The folder's name carries a SHA-256 over everything that it is made of, so a changed source gets another folder.
    ``progress(done, total, module or file)`` is called while it is made, or checked.
    Processes may race: all make it, the first to finish gives it its name, and the others take that one.

    Raises:
        DataError: a calibration file cannot be read.
        ModelError, ConfigError: as `quantize_checkpoint`; ModelError also where the folder that is there was damaged.
    """
    src, exclude, calibrate = Path(src), tuple(exclude), tuple(calibrate)
    if foreign_layout(read_config(src), src) not in (None, "compressed-tensors"):
        return _made_of(src, Path(cache_dir), "mxfp4", import_checkpoint, progress)
    key = _key([_FORMAT_VERSION, scale_rule, sorted(exclude), len(calibrate)], src)
    for text in calibrate:
        try:
            key.update(b"embedded" if text == "embedded" else bytes.fromhex(known_digest(Path(text))))
        except OSError as error:
            raise DataError(f"cannot read calibration texts {text} ({error.strerror}): give a JSONL file") from error
    way = f"{scale_rule}-gptq" if calibrate else scale_rule
    target = Path(cache_dir) / f"{src.resolve().name}-mxfp4-{way}-{key.hexdigest()[:16]}"
    if target.is_dir():
        check_made(target, progress)
        return target
    try:
        if calibrate:
            from verl_aqn.checkpoints.gptq import quantize_with_gptq  # slow to import, and seldom asked for

            quantize_with_gptq(src, target, list(calibrate), scale_rule, exclude, progress)
        else:
            quantize_checkpoint(src, target, scale_rule, exclude, progress)
    except ModelError:
        if not target.is_dir():  # else another process was faster
            raise
    return target


def dequantized_cache(
    src: str | Path, cache_dir: str | Path, progress: Callable[[int, int, str], None] | None = None
) -> Path:
    """The exact bf16 equal of the packed folder ``src`` under ``cache_dir``, made where it is not there yet."""
    return _made_of(Path(src), Path(cache_dir), "bf16", dequantize_checkpoint, progress)


def modelslim_cache(
    src: str | Path, cache_dir: str | Path, progress: Callable[[int, int, str], None] | None = None
) -> Path:
    """The packed folder ``src`` with the same bytes under ModelSlim's names, made where it is not there yet."""
    make = partial(import_checkpoint, format="modelslim")
    return _made_of(Path(src), Path(cache_dir), "modelslim", make, progress)


def check_made(folder: Path, progress: Callable[[int, int, str], None] | None = None) -> None:
    """Hold a model folder against what this project recorded in it when it was made; others are left alone.

    Every file against its SHA-256. Folders of versions that did not record those: the packed modules against
    ``base_digest`` of ``quantization.json``, and nothing else.

    Raises:
        ModelError: a file is missing, was changed, or was added.
    """
    if check_checksums(folder, progress) or not (folder / FILE).is_file() or not is_packed(folder):
        return
    recorded = read_json(folder / FILE).get("base_digest")
    if recorded and recorded != (found := checkpoint_digest(folder)):
        raise ModelError(
            f"the packed weights of {folder} are not those of its {FILE} (digest {found[:16]}…, recorded "
            f"{recorded[:16]}…): delete {folder} and run again, which makes a cached folder anew"
        )


def _made_of(
    src: Path,
    cache_dir: Path,
    form: str,
    make: Callable[[Path, Path], Any],
    progress: Callable[[int, int, str], None] | None,
) -> Path:
    target = cache_dir / f"{src.resolve().name}-{form}-{_key([_FORMAT_VERSION, form], src).hexdigest()[:16]}"
    if target.is_dir():
        check_made(target, progress)
        return target
    try:
        make(src, target)
    except ModelError:
        if not target.is_dir():  # else another process was faster
            raise
    return target


def _key(made_with: list, src: Path) -> "hashlib._Hash":
    key = hashlib.sha256(json.dumps(made_with).encode())
    for file in [src / "config.json", *Weights(src).files, *companions(src)]:
        key.update(file.name.encode() + b"\0" + bytes.fromhex(known_digest(file)))
    return key
