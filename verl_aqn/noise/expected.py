"""The norms that a model's folder promises, and whether the rollout has these and no others."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from verl_aqn.errors import EvidenceError
from verl_aqn.noise.norms import canonical_names, survey
from verl_aqn.order import NoiseOrder


def expected_norms(folder: str | Path) -> list[str]:
    """Return the names, as in the checkpoint, of the norms of the model in `folder` that can carry noise.

    The model is built from config.json as transformers builds it; no weights are read.

    Raises:
        ModelError: transformers cannot build the model.
    """
    from verl_aqn.mxfp4.model import empty_model

    model = empty_model(Path(folder))
    names = canonical_names(model)
    return sorted(names(name) for name in survey(model).found)


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
            (wanted - held, "the model has in its folder, but rollout rank {rank} has not: vLLM fuses or leaves out"),
            (held - wanted, "rollout rank {rank} has, but the model in its folder has not: vLLM adds or renames"),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise EvidenceError(
                    f"norm {min(names)}{more}: {fault.format(rank=rank)} it ({len(held)} found, {len(wanted)} "
                    "expected): exclude it in aqn.noise.exclude"
                )
