"""The source of an export: one checkpoint of a run, and the run's records about it."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.checkpoints.cached import check_made
from verl_aqn.checkpoints.foreign import import_checkpoint
from verl_aqn.checkpoints.formats import MODELSLIM_FORMATS
from verl_aqn.checkpoints.loading import dequantize_checkpoint
from verl_aqn.checkpoints.modelslim import DESCRIPTION
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import SERVED
from verl_aqn.errors import DataError, EvidenceError, ModelError
from verl_aqn.runs.checkpoints import config_of, find_checkpoint
from verl_aqn.runs.evidence import check_proved
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.provenance import model_digest


@dataclass(frozen=True)
class Source:
    """A checkpoint of a run.

    `base_digest`: the digest of the packed weights of the base; None for an unquantised base. `sent`: the digest of the
    adapter that the rollout received after this step.
    """

    run: RunFolder
    step: int
    config: DictConfig
    base: Path
    base_digest: str | None
    sent: str

    @property
    def actor(self) -> Path:
        """The folder of the actor that verl wrote."""
        return self.run.checkpoints / f"global_step_{self.step}" / "actor"

    @property
    def served(self) -> Path:
        """The folder of the base in the rollout weight format of the run."""
        return Path(OmegaConf.select(self.config, f"actor_rollout_ref.model.override_config.{SERVED}") or self.base)

    @property
    def packed(self) -> bool:
        return self.base_digest is not None

    def with_base(self, folder: Path) -> DictConfig:
        """Return the config of the run with ``folder`` in place of the base."""
        config = copy.deepcopy(self.config)
        config.actor_rollout_ref.model.path = str(folder)
        return config

    @contextlib.contextmanager
    def in_rollout_format(self, folder: Path) -> Iterator[Path]:
        """Give the packed ``folder`` in the rollout weight format of the run: itself, or a copy beside its files."""
        if self.served == self.base:
            yield folder
            return
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            copied = Path(temporary) / "served"
            if (self.served / DESCRIPTION).is_file():
                activation = parse_aqn(self.config).mxfp4.activation
                import_checkpoint(folder, copied, MODELSLIM_FORMATS[activation])
            else:
                dequantize_checkpoint(folder, copied)
            yield copied


def find_source(path: Path) -> Source:
    """Find the checkpoint `path` (``global_step_N``), or the last one of the run `path` or of the newest run in it.

    The only large files that are read are those of the base, whose digest must be the recorded one.

    Raises:
        DataError: there is no run or no checkpoint, or the run has no record about its step.
        ModelError: the base does not exist.
        EvidenceError: the base is not that of the run, or the evidence of the run fails its checks.
    """
    run, step = find_checkpoint(path)
    config = config_of(run)
    check_proved(run)
    evidence = list(run.read("evidence.jsonl"))
    # If a step was repeated after a crash, the checkpoint is from the later record.
    sent = next((r["sent"] for r in reversed(evidence) if r["kind"] == "adapter" and r["step"] == step), None)
    if sent is None:
        raise DataError(
            f"{run.path / 'evidence.jsonl'} has no record of the adapter of step {step}: the export cannot be checked"
        )
    base = Path(config.actor_rollout_ref.model.path)
    if not (base / "config.json").is_file():
        raise ModelError(
            f"the run's base {base} does not exist: `verl-aqn train RECIPE --dry-run` with the run's settings makes a "
            "packed base in the cache again"
        )
    digest = next((record.get("disk") for record in reversed(evidence) if record["kind"] == "base"), None)
    if is_packed(base) != (digest is not None):
        raise EvidenceError(f"{base} is not the run's base: one of the two is packed MXFP4 and the other is not")
    source = Source(run, step, config, base, digest, sent)
    for folder in {base, source.served}:  # the digest of packed modules does not cover embeddings, head and norms
        check_made(folder)
    # Files of a packed base that was made again may differ although its values are equal.
    recorded = digest or (run.block("versions.json") or {}).get("base")
    if recorded not in (None, checkpoint_digest(base) if digest else model_digest(base)):
        raise EvidenceError(f"{base} is not the run's base: its digest is not {recorded[:16]}…, which the run recorded")
    return source
