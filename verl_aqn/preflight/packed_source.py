"""Check the settings of rounding against a base that is already packed: it is not rounded again."""

from pathlib import Path
from typing import get_args

from omegaconf import DictConfig

from verl_aqn.config.schema import Mxfp4Config, ScaleRule, parse_aqn
from verl_aqn.errors import ModelError


def settle_rounding(config: DictConfig, source: Path) -> None:
    """Reject settings of `aqn.mxfp4` that ask a packed base for another rounding, and set its own scale rule.

    The default scale rule asks for nothing: it becomes the rule that the folder records, so that the run's record has
    the right one.

    Raises:
        ModelError: `source` is packed, and calibrate, keep, exclude or scale_rule would change it.
    """
    from verl_aqn.checkpoints.foreign import foreign_layout
    from verl_aqn.checkpoints.storage import read_config

    mxfp4 = parse_aqn(config).mxfp4
    if not mxfp4.enabled or foreign_layout(read_config(source), source) is None:
        return
    already = f"{source} is already MXFP4, so aqn.mxfp4"
    if mxfp4.keep.worst:
        raise ModelError(f"{already}.keep cannot choose layers: set keep.worst=0")
    if mxfp4.calibrate:
        raise ModelError(f"{already}.calibrate cannot round it again: set calibrate=[], or start from its bf16 model")
    default, rule = Mxfp4Config(), _recorded_rule(source)
    if mxfp4.scale_rule not in (rule, default.scale_rule):
        raise ModelError(
            f"{already}.scale_rule={mxfp4.scale_rule} cannot change its scales, whose rule is "
            f"{rule or 'not recorded'}: set scale_rule={rule or default.scale_rule}, or start from its bf16 model"
        )
    if more := [pattern for pattern in mxfp4.exclude if pattern not in default.exclude]:
        _check_excluded(source, more, already)
    if rule in get_args(ScaleRule):
        config.aqn.mxfp4.scale_rule = rule


def _recorded_rule(source: Path) -> str | None:
    from verl_aqn.checkpoints.error_report import FILE
    from verl_aqn.checkpoints.storage import read_json

    return read_json(source / FILE).get("scale_rule") if (source / FILE).is_file() else None


def _check_excluded(source: Path, patterns: list[str], already: str) -> None:
    """Check that the folder has everything in 16 bits that `patterns` name, by names of the folder or of the model.

    Raises:
        ModelError: a module is packed, or there is none of this name.
    """
    from verl_aqn.checkpoints.building import build
    from verl_aqn.checkpoints.foreign import packed_names
    from verl_aqn.checkpoints.naming import Naming
    from verl_aqn.checkpoints.packing_plan import matches
    from verl_aqn.checkpoints.storage import Weights

    weights, packed, built = Weights(source), packed_names(source), build(source)
    naming = Naming(built, weights.specs)
    names = [(name, name) for name in [*packed, *(tensor.removesuffix(".weight") for tensor in weights.specs)]]
    for name, _ in built.model.named_modules():
        names += [(name, naming.in_checkpoint(name)), (naming.in_checkpoint(name), naming.in_checkpoint(name))]
    for pattern in patterns:
        found = {stored for name, stored in names if name and matches(name, pattern)}
        if not found:
            raise ModelError(f"aqn.mxfp4.exclude has {pattern!r}, which matches no module of {source}: remove it")
        for name in packed:
            if name in found or any(name.startswith(f"{module}.") for module in found):
                raise ModelError(
                    f"{already}.exclude={pattern} cannot put {name} back to 16 bits: remove it, or start from the bf16 "
                    "model"
                )
