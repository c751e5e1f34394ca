"""The norms that the rollout of a model folder is expected to have."""

from pathlib import Path

from verl_aqn.checkpoints.building import empty_model
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.noise.norms import survey


def expected_norms(folder: str | Path) -> list[str]:
    """Return the names, as in the checkpoint, of the norms of the model in `folder` that can carry noise.

    The model is built from config.json as transformers builds it; no weights are read.

    Raises:
        ModelError: transformers cannot build the model.
    """
    model = empty_model(Path(folder))
    names = Naming.of_folder(folder)
    return sorted(names.in_checkpoint(name) for name in survey(model).found)
