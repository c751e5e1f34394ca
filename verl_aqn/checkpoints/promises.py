"""Checks for the folders that `quantize` and the importers write: this project and vLLM must be able to load them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.errors import ModelError


def check_opens(folder: Path, target: Path) -> None:
    """Open a packed ``folder`` as the trainer does, without reading values, before it is renamed to ``target``.

    Raises:
        ModelError: the names, the shapes and the config of the folder do not describe one model.
    """
    with _instead_of(folder, target):
        load_model(folder, device="meta", attn_implementation="eager")  # every architecture has eager attention


def check_ties(model: PreTrainedModel, sources: dict[str, list[str]], weights: Weights, path: Path) -> None:
    """Check that tensors that config.json ties have equal values in the checkpoint.

    ``sources`` lists for each tensor of the model the tensors of ``weights`` that it is made of.

    Raises:
        ModelError: the checkpoint stores two tied tensors with different values.
    """
    for copied, original in model.all_tied_weights_keys.items():
        names = sources.get(copied), sources.get(original)
        if not names[0] or not names[1] or names[0] == names[1]:
            continue
        theirs, ours = weights.read(names[0][0]), weights.read(names[1][0])
        if not torch.equal(theirs, ours):
            raise ModelError(
                f"{path / 'config.json'} ties {copied} to {original}, but the checkpoint stores {names[0][0]} with "
                f"other values ({weights.file_of(names[0][0])}): set tie_word_embeddings to false, or remove the "
                "tensor"
            )


def as_kept(name: str, weights: Weights, dtype: torch.dtype) -> Tensor:
    """Read a tensor that is not packed, in ``dtype``.

    Raises:
        ModelError: the tensor contains NaN or Inf, or a value that ``dtype`` cannot hold.
    """
    tensor = weights.read(name)
    kept = tensor.to(dtype)
    if kept.is_floating_point() and not _is_finite(kept):
        fault = f"values beyond the range of {dtype}" if _is_finite(tensor) else "NaN or Inf"
        raise ModelError(f"tensor {name} of {weights.file_of(name)} contains {fault}: use another checkpoint")
    return kept


def _is_finite(x: Tensor) -> bool:
    """Return whether all values are finite: whether the smallest and the largest are, because both are NaN for any NaN.

    This takes one pass and no memory; ``x.isfinite()`` was 50 times as slow on a CPU.
    """
    return x.numel() == 0 or all(bool(extreme.isfinite()) for extreme in x.aminmax())


@contextlib.contextmanager
def _instead_of(folder: Path, target: Path) -> Iterator[None]:
    """Replace the temporary name of a folder in error messages by its final name."""
    try:
        yield
    except ModelError as error:
        said = str(error).replace(str(folder), str(target))
        raise ModelError(f"{target} was not created, because training could not load it: {said}") from error
