"""Which layers to keep in 16 bits: those that rounding hurts most, within a share of the weights.

Layers that an engine fuses into one, and the experts of a layer, are kept or packed together. Two measures rank them:

- ``sqnr``: the signal-to-noise ratio of the rounded weights, lowest first. It needs nothing but the report of the
  packed folder.
- ``loss``: the next-token loss on calibration texts that is regained when a group alone is put back to 16 bits and all
  others stay rounded, per weight, highest first. One pass over the texts for each group.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl_aqn.checkpoints.calibrate import calibration_ids
from verl_aqn.checkpoints.error_report import FILE
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing_plan import EXCLUDE, make_plan
from verl_aqn.checkpoints.storage import Weights, read_json
from verl_aqn.errors import ConfigError
from verl_aqn.mxfp4.dense import dequantize_linears
from verl_aqn.mxfp4.error_split import ratio_db
from verl_aqn.mxfp4.fused import fused_groups
from verl_aqn.mxfp4.names import experts_of

SEQUENCES = 8  # of 256 tokens each


class Group(NamedTuple):
    """Packed modules that are kept in 16 bits together, or not at all."""

    modules: tuple[str, ...]
    elements: int
    sqnr_db: float

    @property
    def names(self) -> tuple[str, ...]:
        """The entries for ``exclude`` that name exactly these modules."""
        experts = experts_of(self.modules[0])
        return (f"{experts}.*",) if experts else self.modules


def worst(
    src: str | Path,
    packed: str | Path,
    share: float,
    by: str,
    exclude: Iterable[str] = EXCLUDE,
    texts: Iterable[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[str, ...]:
    """Return the entries for ``exclude`` that keep the worst groups, with at most ``share`` of the packed weights.

    Groups are taken from the worst on; a group that no longer fits is passed over.

    Args:
        src: the bf16 folder. packed: the folder that was made of it, with ``exclude``.
        by: ``sqnr`` or ``loss`` (see the module's docstring).
        texts: for ``loss``, as in `verl_aqn.checkpoints.calibrate.calibration_ids`; none: ``embedded``.
        progress: called as ``progress(done, total, module)`` while the loss is measured.

    Raises:
        ConfigError: no group fits into ``share``, or the loss of experts is asked for.
        DataError, ModelError: as `calibration_ids` and `make_plan`.
    """
    groups = groups_of(Path(packed))
    if by == "loss":
        gains = loss_gains(Path(src), Path(packed), groups, tuple(exclude), list(texts) or ["embedded"], progress)
        order = sorted(groups, key=lambda group: -gains[group] / group.elements)
    else:
        order = sorted(groups, key=lambda group: group.sqnr_db)
    total = sum(group.elements for group in groups)
    names: list[str] = []
    room = share * total
    for group in order:
        if group.elements <= room:
            room -= group.elements
            names += group.names
    if not names:
        smallest = min(group.elements for group in groups) / total
        raise ConfigError(
            f"keep.worst={share:g} keeps nothing: the smallest layer has {smallest:.2g} of the weights: set at least "
            "that, or 0"
        )
    return tuple(names)


def groups_of(packed: Path) -> list[Group]:
    """Return the groups of a packed folder, from the report in it, in the order of the model."""
    rows = {row["name"]: row for row in read_json(packed / FILE)["modules"]}
    dense: list[str] = []
    experts: dict[str, list[str]] = {}
    for name in rows:
        module = experts_of(name)
        (experts.setdefault(module, []) if module else dense).append(name)
    groups = []
    for members in [*fused_groups(dense), *map(tuple, experts.values())]:
        elements = sum(torch.Size(rows[name]["shape"]).numel() for name in members)
        signal, noise = (sum(rows[name][part] for name in members) for part in ("signal", "noise"))
        groups.append(Group(tuple(members), elements, ratio_db(signal, noise)))
    place = {name: number for number, name in enumerate(rows)}
    return sorted(groups, key=lambda group: place[group.modules[0]])


@torch.inference_mode()
def loss_gains(
    src: Path,
    packed: Path,
    groups: Iterable[Group],
    exclude: tuple[str, ...],
    texts: list[str],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[Group, float]:
    """Return by how much the loss (nats a token) falls when a group alone is put back to its 16-bit weights."""
    groups = list(groups)
    if experts := next((group for group in groups if experts_of(group.modules[0])), None):
        raise ConfigError(
            f"keep.by=loss does not measure experts ({experts.names[0]}): set aqn.mxfp4.keep.by=sqnr (--keep-by sqnr)"
        )
    weights = Weights(src)
    pieces = {piece.module: piece for piece in make_plan(src, weights, exclude).pieces}
    model = load_model(packed)
    at = {name: model.checkpoint_names.module_in_model(name) for group in groups for name in group.modules}
    dequantize_linears(model)
    ids = calibration_ids(src, texts, sequences=SEQUENCES)
    rounded = _loss(model, ids)
    gains = {}
    for done, group in enumerate(groups, start=1):
        parameters = [(name, model.get_submodule(at[name]).get_parameter("weight")) for name in group.modules]
        before = [parameter.clone() for _, parameter in parameters]
        for name, parameter in parameters:
            parameter.copy_(pieces[name].read(weights))
        gains[group] = rounded - _loss(model, ids)
        for (_, parameter), values in zip(parameters, before, strict=True):
            parameter.copy_(values)
        if progress is not None:
            progress(done, len(groups), group.modules[0])
    return gains


def _loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the next-token loss in nats a token over ids int64 [S, L], without the logits of all texts at once."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    total = 0.0
    for row, hidden in zip(ids, decoder(input_ids=ids, use_cache=False).last_hidden_state, strict=True):
        scores = head(hidden[:-1]).float().log_softmax(-1)
        total -= scores.gather(1, row[1:, None]).double().sum().item()
    return total / (ids.shape[0] * (ids.shape[1] - 1))
