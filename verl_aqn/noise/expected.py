"""The norms that a model's folder promises, and whether the rollout has these and no others."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4.building import empty_model
from verl_aqn.mxfp4.names import Naming
from verl_aqn.noise.norms import survey
from verl_aqn.order import NoiseOrder


def expected_norms(folder: str | Path) -> list[str]:
    """Return the names, as in the checkpoint, of the norms of the model in `folder` that can carry noise.

    The model is built from config.json as transformers builds it; no weights are read.

    Raises:
        ModelError: transformers cannot build the model.
    """
    model = empty_model(Path(folder))
    names = Naming.of_folder(folder)
    return sorted(names.in_checkpoint(name) for name in survey(model).found)


def check_norms(expected: Collection[str], ranks: Collection[Mapping[str, Any]], order: NoiseOrder) -> None:
    """Raise EvidenceError unless every rank of the rollout has the `expected` norms, as far as `order` needs them.

    `ranks`: what `NoiseInjector.describe` says in each.
    """
    if "norm" not in order.targets:
        return
    wanted = {name for name in expected if order.selects(name)}
    for rank, answer in enumerate(ranks):
        held = {name for name in answer["names"] if order.selects(name)}
        for names, fault in (
            (wanted - held, "the model in its folder has it, but not rollout rank {}: vLLM fuses it or leaves it out"),
            (held - wanted, "rollout rank {} has it, but not the model in its folder: vLLM adds or renames it"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise EvidenceError(
                    f"norm {min(names)}{more}: {fault.format(rank)} ({len(held)} found, {len(wanted)} expected): "
                    "exclude it in aqn.noise.exclude, or take `norm` out of aqn.noise.targets"
                )
