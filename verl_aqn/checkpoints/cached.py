"""A cache of packed checkpoints and of the same weights in other formats; the key is a digest of the inputs.

A folder from the cache is compared with the digests that were recorded when it was made (`check_made`).
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
from verl_aqn.checkpoints.formats import MODELSLIM_FORMATS
from verl_aqn.checkpoints.int8_base import check_changes, read_changes, write_int8
from verl_aqn.checkpoints.loading import dequantize_checkpoint
from verl_aqn.checkpoints.packing import EXCLUDE, checkpoint_digest, is_packed, quantize_checkpoint
from verl_aqn.checkpoints.storage import Weights, companions, read_config, read_json
from verl_aqn.errors import DataError, ModelError

# Part of the cache key: increase it when the same source would give another packed folder.
_FORMAT_VERSION = 5


def quantized_cache(
    src: str | Path,
    cache_dir: str | Path,
    scale_rule: str = "mse",
    exclude: Iterable[str] = EXCLUDE,
    calibrate: Iterable[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
    keep: tuple[float, str] = (0.0, "sqnr"),
) -> Path:
    """Return the packed folder of ``src`` under ``cache_dir``; make it if it does not exist yet.

    A source that is already MXFP4 in the layout of another tool keeps its codes; the arguments about rounding are then
    not used (`prepare_model` refuses settings that ask for another rounding). With ``calibrate`` (texts as in
    `verl_aqn.checkpoints.calibrate.calibration_ids`) rounding is error-compensated. With ``keep`` = (share, measure)
    the worst layers stay in 16 bits (`verl_aqn.checkpoints.keeping.worst`); they are found in the folder without
    ``keep``, which is made first. The name of the folder contains a SHA-256 over all inputs, so a changed source gets
    another folder. ``progress(done, total, module or file)`` is called while the folder is made or checked. If several
    processes make the same folder, the first one to finish publishes its result, and the others use that.

    Raises:
        DataError: a calibration file cannot be read.
        ModelError, ConfigError: as `quantize_checkpoint`; ModelError also if the cached folder is damaged.
    """
    src, exclude, calibrate = Path(src), tuple(exclude), tuple(calibrate)
    if foreign_layout(read_config(src), src) not in (None, "compressed-tensors"):
        return _made_of(src, Path(cache_dir), "mxfp4", import_checkpoint, progress)
    share, measure = keep
    inputs = [_FORMAT_VERSION, scale_rule, sorted(exclude), len(calibrate)]
    key = _key([*inputs, "keep", share, measure] if share else inputs, src)
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
    if share:
        from verl_aqn.checkpoints.keeping import worst  # slow to import and rarely needed

        rounded = quantized_cache(src, cache_dir, scale_rule, exclude, calibrate, progress)
        exclude = (*exclude, *worst(src, rounded, share, measure, exclude, calibrate, progress))
    try:
        if calibrate:
            from verl_aqn.checkpoints.gptq import quantize_with_gptq  # slow to import and rarely needed

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
    """Return packed folder ``src`` dequantised to bf16 (exact) under ``cache_dir``; make it if it does not exist."""
    return _made_of(Path(src), Path(cache_dir), "bf16", dequantize_checkpoint, progress)


def modelslim_cache(
    src: str | Path,
    cache_dir: str | Path,
    progress: Callable[[int, int, str], None] | None = None,
    activation: str = "mxfp4",
) -> Path:
    """Return packed folder ``src`` in ModelSlim's format, with the same bytes; make it if it does not exist yet.

    ``activation`` (`mxfp4` or `mxfp8`) says how vllm-ascend will round activations.
    """
    format = MODELSLIM_FORMATS[activation]
    return _made_of(Path(src), Path(cache_dir), format, partial(import_checkpoint, format=format), progress)


def int8_cache(src: str | Path, cache_dir: str | Path, progress: Callable[[int, int, str], None] | None = None) -> Path:
    """Return packed folder ``src`` in int8 under ``cache_dir``; make it if it does not exist yet.

    What changes in each matrix is in the folder (`verl_aqn.checkpoints.int8_base.read_changes`).

    Raises:
        ModelError: as `write_int8`, also if the cached folder changes more than is allowed now.
    """
    folder = _made_of(Path(src), Path(cache_dir), "int8", partial(write_int8, progress=progress), progress)
    check_changes(read_changes(folder), folder)
    return folder


def check_made(folder: Path, progress: Callable[[int, int, str], None] | None = None) -> None:
    """Check a model folder against the digests that this project recorded in it; other folders are not checked.

    Every file is compared with its SHA-256. In folders of older versions, which did not record these, only the packed
    modules are compared with ``base_digest`` in ``quantization.json``.

    Raises:
        ModelError: a file is missing, was changed, or was added.
    """
    if check_checksums(folder, progress) or not (folder / FILE).is_file() or not is_packed(folder):
        return
    recorded = read_json(folder / FILE).get("base_digest")
    if recorded and recorded != (found := checkpoint_digest(folder)):
        raise ModelError(
            f"the packed weights of {folder} do not match its {FILE} (digest {found[:16]}…, recorded "
            f"{recorded[:16]}…): delete {folder} and run again; a cached folder is then made again"
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
