"""What is exported: one checkpoint of a run, and what the run has on record about it."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.checkpoints.cached import check_made
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed
from verl_aqn.config.serving import SERVED
from verl_aqn.errors import DataError, EvidenceError, ModelError
from verl_aqn.runs.checkpoints import config_of, find_checkpoint
from verl_aqn.runs.evidence import check_proved
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.provenance import model_digest


@dataclass(frozen=True)
class Source:
    """A checkpoint. `base_digest`: of packed weights, None for an unquantised base; `sent`: the digest of the adapter
    that the rollout was given after this step."""

    run: RunFolder
    step: int
    config: DictConfig
    base: Path
    base_digest: str | None
    sent: str

    @property
    def actor(self) -> Path:
        """Where verl put the actor."""
        return self.run.checkpoints / f"global_step_{self.step}" / "actor"

    @property
    def served(self) -> Path:
        """The base in the form that the run's rollout had."""
        return Path(OmegaConf.select(self.config, f"actor_rollout_ref.model.override_config.{SERVED}") or self.base)

    @property
    def packed(self) -> bool:
        return self.base_digest is not None


def find_source(path: Path) -> Source:
    """The checkpoint `path` (``global_step_N``), or the last one of the run `path` or of the newest run in it.

    Nothing large is read but the base, whose digest must be the recorded one.

    Raises:
        DataError: no run, no checkpoint, or nothing on record about its step.
        ModelError: the base is gone. EvidenceError: it is not the run's, or the run's evidence does not hold.
    """
    run, step = find_checkpoint(path)
    config = config_of(run)
    check_proved(run)
    evidence = list(run.read("evidence.jsonl"))
    # Of a step that was taken twice, after a crash, the later one was saved.
    sent = next((r["sent"] for r in reversed(evidence) if r["kind"] == "adapter" and r["step"] == step), None)
    if sent is None:
        raise DataError(
            f"{run.path / 'evidence.jsonl'} says nothing of the adapter of step {step}: nothing to prove by"
        )
    base = Path(config.actor_rollout_ref.model.path)
    if not (base / "config.json").is_file():
        raise ModelError(
            f"the run's base {base} is not there: `verl-aqn train RECIPE --dry-run` with the run's settings makes a "
            "packed one again in the cache"
        )
    digest = next((record.get("disk") for record in reversed(evidence) if record["kind"] == "base"), None)
    if is_packed(base) != (digest is not None):
        raise EvidenceError(f"{base} is not the run's base: one of them is packed MXFP4 and the other is not")
    source = Source(run, step, config, base, digest, sent)
    for folder in {base, source.served}:  # what the digest of packed modules leaves out: embeddings, head, norms
        check_made(folder)
    # Made anew with other arithmetic a packed base's files may differ where its values do not.
    recorded = digest or (run.block("versions.json") or {}).get("base")
    if recorded not in (None, checkpoint_digest(base) if digest else model_digest(base)):
        raise EvidenceError(f"{base} is not the run's base: its digest is not {recorded[:16]}…, which the run recorded")
    return source
