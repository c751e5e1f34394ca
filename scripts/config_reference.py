"""Write the reference table in docs/configuration.md from the schema of the `aqn:` block.

python scripts/config_reference.py            write the table
python scripts/config_reference.py --check    exit with 1 where the page is not up to date

Types, defaults and choices come from the dataclasses of the schema. `MEANINGS` has one sentence for each key; a key
without a sentence, and a sentence without a key, are errors.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from verl_aqn.config import schema  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
BEGIN = "<!-- begin: written by scripts/config_reference.py -->"
END = "<!-- end: written by scripts/config_reference.py -->"

MEANINGS = {
    "seed": "Seed of noise, adapters before training, order of the data, and the rollout's samples.",
    "request_seeds": "Give each response a seed of its own, so that runs of one `aqn.seed` share random numbers.",
    "noise.enabled": "Add noise. `false` is the control.",
    "noise.kind": "Shape of the schedule.",
    "noise.sigma_start": "σ of the first stage with noise.",
    "noise.sigma_end": "σ of the last stage.",
    "noise.target_kl": "KL(clean ‖ noisy) in nats per token. σ_start becomes the σ that has it; σ_end keeps its ratio.",
    "noise.probe": "Measure σ_start before the run starts, and refuse one from which nothing can be learned.",
    "noise.num_stages": "Number of stages of the schedule, the warm-up included.",
    "noise.epoch_aware": "Give every epoch its own warm-up and stages.",
    "noise.warmup": "Share of the steps before noise begins. `null` is one stage.",
    "noise.off_from_step": "No noise from this RL step on (counted from 0).",
    "noise.control": "Let σ follow a measurement after its start. `null`: the schedule alone decides.",
    "noise.control.target": "What each step measures, in nats per token.",
    "noise.control.value": "The target, or points such as `[{step: 0, value: 0.1}, {step: 28, value: 0.001}]`.",
    "noise.control.sigma_min": "Lower bound of σ, above 0.",
    "noise.control.sigma_max": "Upper bound of σ.",
    "noise.control.gain": "Change of ln σ for an error of 1 in ln(target / measurement).",
    "noise.control.dead_band": "\\|ln(target / measurement)\\| up to which σ stays; it moves until half of it is left.",
    "noise.control.max_change": "Largest factor by which σ changes in one step.",
    "noise.unit": "What σ is counted in: 1, the rms of the module's clean weight, or each clean weight.",
    "noise.targets": "Kinds of modules that get noise.",
    "noise.include": "Shell patterns of module names that get noise. None means all.",
    "noise.exclude": "Shell patterns of module names that get no noise.",
    "noise.router_norms": "Also add noise to norms that feed a router.",
    "noise.layers.kind": "How σ is multiplied by module.",
    "noise.layers.modules": "For `targeted`: layers (`3`, `0-7`) or shell patterns of module names.",
    "noise.layers.multiplier": "For `targeted`: the multiplier of `modules`.",
    "noise.layers.others": "For `targeted` and `zones`: the multiplier of all other modules.",
    "noise.layers.first": "For `variable` and `inverse`: the multiplier in layer 0.",
    "noise.layers.last": "For `variable` and `inverse`: the multiplier in the last layer.",
    "noise.layers.boundary": "For `zones`: the share of the steps at which `before` becomes `after`.",
    "noise.layers.zones": "For `zones`: blocks with `modules`, `before` and `after`.",
    "noise.apply_to": "Which forwards have the noise. With `rollout+actor` also old log-probs and the update.",
    "noise.seed": "Seed of the noise alone. Recipes set it to `aqn.seed`.",
    "mxfp4.enabled": "Pack the base as MXFP4. `false` keeps bf16.",
    "mxfp4.scale_rule": "How the scale of a block of 32 weights is chosen.",
    "mxfp4.activation": "`mxfp8` (W4A8) or `mxfp4` (W4A4) rounds activations too, alike in actor and rollout.",
    "mxfp4.activation_scale_rule": "Scale rule of 4-bit activations. A profile sets what the device's kernels do.",
    "mxfp4.activation_rounding": "Rounding of 4-bit activations between two codes. A profile sets it.",
    "mxfp4.rollout_weight_format": "Form of the base in the rollout. `auto` chooses by the device, but never "
    "`int8`, which is for Ascend A2 and A3 and may round.",
    "mxfp4.cache_dequantized": "Keep a 16-bit copy of the weights in the actor: faster, five times the memory.",
    "mxfp4.exclude": "Modules that stay in bf16, with all that they contain.",
    "mxfp4.keep.worst": "Share of the weights that stay in bf16, too: of the layers that rounding hurts most. 0: none.",
    "mxfp4.keep.by": "How they are chosen: by the SQNR of their weights, or by their loss on calibration texts.",
    "mxfp4.calibrate": "Texts for error-compensated rounding (GPTQ): JSON lines files or `embedded`.",
    "mismatch.rescore": "One response in this many is scored again without noise. 0: none.",
    "mismatch.warn": "Mismatch of trainer and rollout in nats per token above which a step causes a warning.",
    "mismatch.stop": "Mismatch in nats per token above which the run stops before the update.",
    "target.accuracy": "Accuracy that the experiment wants to exceed (fraction of 1). `null`: no target.",
    "target.model": "Part of the name or path of the model that the target is for. `null`: any.",
    "target.source": "Data source that the target is for. `null`: any.",
    "target.problems": "Number of validation problems that the target is for. `null`: any.",
    "run.dir": "Folder for runs. `null` is `/tmp/mxfp4_RECIPE`.",
    "run.fresh": "Start a new run even if the last one can be resumed.",
    "run.restarts": "Maximum number of automatic restarts after a crash or a hang.",
    "run.hang_timeout_factor": "A phase that takes this many times its usual duration counts as hanging. 0: never.",
    "run.allow_failed": "Share of responses of a step or validation that may fail before the run stops.",
    "profile": "What the device needs. `auto` detects the device.",
    "experiment": "Where model, data and sizes come from. With `none` the recipe's own file names them.",
}


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key below `aqn`, annotation, default) of every field, nested blocks included."""
    hints = get_type_hints(cls)
    for one in fields(cls):
        hint = hints[one.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from keys(hint, f"{prefix}{one.name}.")
            continue
        yield f"{prefix}{one.name}", hint, default_of(one)
        if type(None) in get_args(hint):
            for block in filter(is_dataclass, get_args(hint)):  # a block that may be null
                yield from keys(block, f"{prefix}{one.name}.")


def default_of(one: Field) -> Any:
    """Return the default of a field, or `MISSING` in a block that may be null."""
    if one.default is not MISSING:
        return one.default
    return MISSING if one.default_factory is MISSING else one.default_factory()


def type_text(hint: Any) -> str:
    """Return a type as a reader writes its values."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) is Literal:
        return "text"
    if get_origin(hint) is tuple:
        return "list of blocks" if is_dataclass(options[0]) else "list"
    if type(None) in get_args(hint):
        return f"{type_text(options[0])} or null"
    if options:
        return " or ".join(type_text(option) for option in options)
    if is_dataclass(hint):
        return "block"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}[hint]


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the values that a key takes, if they are a fixed list."""
    literal: Any = hint
    for option in (hint, *get_args(hint)):
        if get_origin(option) is Literal:
            literal = option
    return get_args(literal) if get_origin(literal) is Literal else ()


def value_text(value: Any) -> str:
    """Return a default as YAML has it. A key without a default is required if its block is not null."""
    if value is MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table() -> str:
    """Return the reference as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    found = list(keys(schema.AqnConfig))
    names = [key for key, _, _ in found]
    wrong = sorted(set(names) ^ set(MEANINGS))
    if wrong:
        raise SystemExit(f"scripts/config_reference.py: MEANINGS and the schema differ in {', '.join(wrong)}")
    for key, hint, default in found:
        choices = " or ".join(f"`{choice}`" for choice in choices_of(hint))
        meaning = MEANINGS[key] + (f" One of {choices}." if choices and get_origin(hint) is not tuple else "")
        meaning += f" From {choices}." if choices and get_origin(hint) is tuple else ""
        lines.append(f"| `aqn.{key}` | {type_text(hint)} | `{value_text(default)}` | {meaning} |")
    return "\n".join(lines)


def page() -> str:
    """Return the whole page with a new table."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert tail, f"{PAGE.name} lacks the two comments around the table"
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


def main() -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Only check that the page is up to date.")
    new = page()
    if not parser.parse_args().check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != PAGE.read_text(encoding="utf-8"):
        print(f"{PAGE.relative_to(ROOT)} is not up to date: run python scripts/config_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
