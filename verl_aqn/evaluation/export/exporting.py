"""Export of a run's checkpoint as a PEFT adapter or a merged model, checked before the folder is published.

Read `export` first: it contains all steps.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.building import is_multimodal
from verl_aqn.checkpoints.merging import MergeReport, check_merged, covered, open_base, write_merged
from verl_aqn.checkpoints.merging_packed import check_merged_packed, check_packable, merged_copy, write_merged_packed
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.writing import new_folder
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import DataError, EnvironmentFault, EvidenceError, ModelError
from verl_aqn.evaluation.export.export_folders import write_card, write_peft_folder
from verl_aqn.evaluation.export.fsdp_adapter import read_adapter
from verl_aqn.evaluation.export.questions import read_questions
from verl_aqn.evaluation.export.source import Source, find_source
from verl_aqn.evaluation.export.trained_model import CALIBRATION_PROMPTS, calibration_rows, free_memory
from verl_aqn.evaluation.export.trial import judge, try_out
from verl_aqn.preflight.adapter_folder import read_folder
from verl_aqn.preflight.policy import load_tokenizer
from verl_aqn.terminal import progress_bar

RECORD = "verl_aqn_export.json"


def export(
    run: Path,
    dst: Path,
    *,
    merge: bool = False,
    packed: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Write the adapter of ``run``, or with ``merge`` a model of base and adapter, to the new folder ``dst``.

    A merged model is in bf16, or with ``packed`` rounded to 4 bits again, calibrated on training prompts of the run
    with the responses of the policy (`verl_aqn.checkpoints.merging_packed`). An adapter is always in bf16.

    ``run`` is a run, a folder of runs, or a checkpoint (`verl_aqn.evaluation.export.source.find_source`). Returns the
    proof, which is also written to ``dst`` (`RECORD`). ``dst`` appears complete and with all checks passed, or not at
    all.

    Fields of the proof: `run`, `run_path`, `step`; `merged`; `base` (path, digest); `adapter` (the digests: `digest` of
    the checkpoint's adapter, `recorded` by the run, `read_back` from the written folder with PEFT, None for a merged
    model); `nonzero_b`, the number of modules that the adapter changes; `rank`, `alpha`, `rslora`; `activation`;
    `merge` (`verl_aqn.checkpoints.merging.MergeReport`, the `unchanged` modules, and the number of tensors `read_back`
    and compared; None for an adapter); `rounding` (`verl_aqn.checkpoints.merging_packed.Rounding`; None for other
    formats); `answers` (`verl_aqn.evaluation.export.trial.Trial.to_dict`); `proved`, False if the trial cannot
    distinguish the export from its base (`answers.undecided` says why). Records of earlier versions lack `proved`,
    `read_back`, `unchanged`, `rounding`, and most fields of `answers`.

    Raises:
        DataError, ModelError: the run, its checkpoint, base or data cannot be used, or ``dst`` exists.
        EvidenceError: the export differs from the run's records, or its responses differ from those of the run.
    """
    source = find_source(run)
    say(f"step {source.step} of {source.run.path}")
    if source.config.actor_rollout_ref.model.lora_adapter_path and not (source.actor / "adapter_config.json").is_file():
        raise DataError(
            f"{source.actor} has no adapter_config.json: its version did not record the scaling of the adapter that "
            "the run started from: train again"
        )
    if not merge and is_multimodal(source.base):
        raise ModelError(
            f"{source.base} is multimodal: PEFT and vLLM have different names for the layers of its text part, so one "
            "adapter folder cannot serve both: export with --merge"
        )
    adapter = read_adapter(source.actor)
    nonzero = check_adapter(source, adapter)
    uniform = adapter.uniform()
    if merge and packed:
        check_packable(source.base, adapter)
    elif merge:
        covered(source.base, open_base(source.base, source.packed), adapter)
    tokenizer = load_tokenizer(source.config, source.base)
    questions = read_questions(source, tokenizer)

    proof: dict[str, Any] = {
        "run": source.run.path.name,
        "run_path": str(source.run.path),
        "step": source.step,
        "merged": merge,
        "dtype": "mxfp4" if merge and packed else "bfloat16",
        "base": {"path": str(source.base), "digest": source.base_digest},
        "adapter": {
            "digest": as_sent(adapter, source.base).digest(),
            "recorded": source.sent,
            "read_back": None,
            "modules": len(adapter.matrices),
        },
        "nonzero_b": nonzero,
        "rank": uniform.rank,
        "alpha": uniform.alpha,
        "rslora": uniform.rslora,
        "activation": parse_aqn(source.config).mxfp4.activation_arithmetic,
        "merge": None,
        "rounding": None,
    }
    with new_folder(dst) as folder:
        if merge:
            proof |= _write_merged(folder, source, adapter, tokenizer, say, packed=packed)
        else:
            write_peft_folder(folder, uniform, source.base)
            proof["adapter"]["read_back"] = read_folder(folder, source.base).digest()
            if proof["adapter"]["read_back"] != source.sent:
                raise EvidenceError(f"the exported adapter, as PEFT reads it, is not the one of {source.run.path}")
        say(f"running {len(questions.prompts)} prompts in the trainer's model and then in vLLM")
        trial = try_out(source, questions, adapter, folder, merge, tokenizer)
        trial = judge(trial, parse_aqn(source.config).mismatch.stop)
        proof |= {"proved": not trial.undecided, "answers": trial.to_dict()}
        write_card(folder, proof)
        (folder / RECORD).write_text(json.dumps(proof, indent=2) + "\n")
    return proof


def _write_merged(
    folder: Path, source: Source, adapter: Adapter, tokenizer: Any, say: Callable[[str], None], *, packed: bool
) -> dict[str, Any]:
    """Write a merged model, read it back, and return the fields `merge` and `rounding` of the proof.

    Raises:
        EvidenceError: the written model is not what base and adapter give, or it equals the base.
    """
    rounding = None
    say("merging")
    if packed:
        with merged_copy(folder, source.base, adapter) as dense:
            say(f"answering {CALIBRATION_PROMPTS} training prompts in the trainer's model, for the calibration")
            ids = _calibration_ids(source, adapter, tokenizer)
            say(f"rounding to 4 bits with {ids.numel()} tokens")
            with progress_bar("rounding") as progress:
                made = write_merged_packed(folder, source.base, adapter, dense, ids, progress)
        rounding = asdict(made)
        say("reading the merged model back")
        report, tensors = check_merged_packed(folder, source.base, adapter, made.digest)
        _check_changed(report, "rounded to 4 bits")
    else:
        report = write_merged(folder, source.base, source.packed, adapter)
        _check_changed(report, "merged to bf16")
        say("reading the merged model back")
        tensors = check_merged(folder, source.base, source.packed, adapter)
    merge = asdict(report) | {"unchanged": report.unchanged, "read_back": tensors}
    return {"merge": merge, "rounding": rounding}


def _calibration_ids(source: Source, adapter: Adapter, tokenizer: Any) -> Tensor:
    """Return `calibration_rows`, and leave their memory to the rounding.

    Raises:
        EnvironmentFault: the device has too little memory for the trainer's model.
    """
    try:
        return calibration_rows(source, adapter, tokenizer)
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"the trainer's model of {source.base} does not fit on one device, so nothing can be calibrated: "
            "export on a larger device, or without --format mxfp4"
        ) from error
    finally:
        free_memory()


def _check_changed(report: MergeReport, how: str) -> None:
    if not report.changed:
        raise EvidenceError(
            f"{how}, the model equals its base bit for bit, because the adapter's update is too small for this format: "
            "export without --merge"
        )


def as_sent(adapter: Adapter, base: Path) -> Adapter:
    """Return the adapter under the names that the rollout receives: for a multimodal base those of its folder."""
    if not is_multimodal(base):
        return adapter
    naming, uniform = Naming.of_folder(base), adapter.uniform()
    return replace(uniform, matrices={naming.in_checkpoint(name): pair for name, pair in uniform.matrices.items()})


def check_adapter(source: Source, adapter: Adapter) -> int:
    """Check that the adapter is the one that the run recorded, and return the number of modules with a nonzero B.

    Raises:
        EvidenceError: the adapter is not that of the run, or every B is zero.
    """
    digest = as_sent(adapter, source.base).digest()
    if digest != source.sent:
        raise EvidenceError(
            f"the adapter in {source.actor} is not the one that the rollout had after step {source.step}: "
            f"its digest is {digest[:16]}…, the recorded digest is {source.sent[:16]}…"
        )
    nonzero = sum(bool(b.any()) for _, b in adapter.matrices.values())
    if not nonzero:
        raise EvidenceError(
            f"after step {source.step} every B is zero: the policy still equals its base, so there is nothing to export"
        )
    return nonzero
