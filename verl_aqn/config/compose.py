"""Compose one config from a recipe, a profile, an experiment and overrides.

Imports neither torch, verl, vLLM nor Ray: reading and checking a recipe takes a fraction of a second.
"""

import difflib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from verl_aqn.config.allowed import check_names, check_numbers, check_types
from verl_aqn.config.overrides import check_overrides
from verl_aqn.config.renamed import current_override, rename_keys
from verl_aqn.config.schema import nearest, parse_aqn
from verl_aqn.config.verl_keys import check_keys, leaves, reason_against
from verl_aqn.errors import ConfigError, EnvironmentFault, first_line

# A block that is null by default: overrides may add any key of it, and `parse_aqn` refuses wrong ones.
OPTIONAL = "aqn.noise.control."
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?(\w[\w.]*)(?:,[^${}]*)?\}")  # a value that is copied from another setting
# `${divide:A,B}` in recipes: A / B, rounded down, at least 1. OmegaConf itself does not calculate.
OmegaConf.register_new_resolver("divide", lambda a, b: max(1, int(a) // int(b)), replace=True)


def recipe_dirs() -> list[Path]:
    """Return the folders in which a recipe name is looked up: of the installed package or of the checkout."""
    package = Path(__file__).resolve().parents[1]
    return [path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()]


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(p.stem for folder in recipe_dirs() for p in folder.glob("*.yaml") if p.stem != "base")


def plan_names() -> list[str]:
    """Return the names of the plans in the package."""
    return sorted(p.stem for folder in recipe_dirs() for p in folder.glob("plans/*.yaml"))


def find_recipe(recipe: str, *, plans: bool = True) -> Path:
    """Return the file of a recipe or plan, given by path or by name.

    `plans`: whether the suggestions in an error message include plans.
    """
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        path = Path(recipe).expanduser()
        if path.suffix != ".yaml":  # Hydra finds no other ending
            raise ConfigError(f"no recipe file {recipe}: the name of a recipe must end in .yaml")
        if not path.is_file():
            raise ConfigError(f"no recipe file {recipe}")
        return path.resolve()
    for path in (folder / place / f"{recipe}.yaml" for folder in recipe_dirs() for place in ("", "plans")):
        if path.is_file():
            return path
    raise ConfigError(f"no recipe {recipe!r}: {nearest(recipe, [*recipe_names(), *(plan_names() if plans else ())])}")


def read_yaml(path: Path) -> Any:
    """Return the content of a recipe's or plan's file. Raises ConfigError if it is not YAML."""
    try:
        # Hydra's loader, a safe one, because PyYAML's own takes the second of two equal keys without a word.
        return get_yaml_loader()(path.read_text(encoding="utf-8")).get_single_data()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: it is not UTF-8 ({first_line(error)}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from error


def _not_yaml(path: Path, error: yaml.YAMLError) -> ConfigError:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return ConfigError(f"{path} is not YAML: {place}{problem or first_line(error)}")


def _refuse_plan(recipe: str, raw: Any) -> None:
    if not isinstance(raw, dict) or "arms" not in raw:
        return
    arms = raw["arms"].values() if isinstance(raw["arms"], dict) else ()
    recipes = dict.fromkeys(str(arm["recipe"]) for arm in arms if isinstance(arm, dict) and "recipe" in arm)
    raise ConfigError(
        f"{recipe} is a plan: run `verl-aqn train {recipe}`; this command needs a single recipe"
        + (f" (its arms: {', '.join(recipes)})" if recipes else "")
    )


def detect_profile() -> str:
    """Return `npu` or `cuda` if the tool of such a device runs successfully, else `cpu`."""
    for tool, profile in (("npu-smi", "npu"), ("nvidia-smi", "cuda")):
        if shutil.which(tool) and subprocess.run([tool], capture_output=True, check=False).returncode == 0:
            return profile
    return "cpu"


def _verl_config_dir() -> Path:
    # find_spec of a top-level package does not import it; importing verl takes seconds.
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault("verl is not installed: run `bash scripts/setup.sh`")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def megatron_lora(config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that a recipe changes in `actor_rollout_ref.model.lora`: {key: (value, verl's default)}.

    verl uses this block for Megatron.
    """
    block: Any = OmegaConf.load(_verl_config_dir() / "model" / "hf_model.yaml").lora
    lora = config.actor_rollout_ref.model.lora
    return {key: (value, block.get(key)) for key, value in lora.items() if value != block.get(key)}


def load_recipe(recipe: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose recipe + profile + experiment + overrides, and check the `aqn:` block.

    `profile=`, `experiment=` and `correction=` among the overrides select those files. Otherwise the recipe's file may
    name profile and experiment (`aqn.profile`, `aqn.experiment`). If it does not, the profile is detected, the
    experiment is `embedded` on a CPU and `gsm8k` on accelerators, and the rollout correction is the recipe's own. All
    other overrides are Hydra overrides. The recipe's file takes precedence over profile and experiment.

    Raises:
        ConfigError: the recipe, a key, or a value does not exist or is invalid.
    """
    path = find_recipe(recipe, plans=False)
    raw = read_yaml(path)
    _refuse_plan(recipe, raw)
    _check_defaults(path, raw)
    profile, experiment, groups, rest = _groups([current_override(one) for one in overrides or []])
    check_overrides(rest)
    rest = [f"++{one}" if one.startswith(OPTIONAL) else one for one in rest]
    _refuse_open(path, raw, rest)
    try:
        config = _compose(path, [*groups, *rest])
        with open_dict(config):
            _check_blocks(OmegaConf.to_container(config), _plain(find_recipe("base"), *groups), path)
            rename_keys(config.get("aqn", {}), warn=True)
        _check_base(config, path)
        check_names(config)  # first, because another engine adds keys that are unknown here
        check_keys(config, _plain(find_recipe("base"), *groups))
        _check_keys(config, path, groups, rest)
        parse_aqn(config)
        check_numbers(config)
        check_types(OmegaConf.to_container(config, resolve=True), _plain(find_recipe("base"), *groups))
    except (HydraException, OmegaConfBaseException) as error:
        if "Could not override 'profile'" in str(error):  # the group is defined in `base`
            raise _without_base(path) from error
        raise ConfigError(f"{path.name}: {_hydra_message(error, path, groups)}") from error
    # The value comes from the recipe's file, or from a file that it builds on.
    for key, used in (("profile", profile), ("experiment", experiment)):
        said, prefixes = config.aqn.get(key, "auto"), (f"{key}=", f"aqn.{key}=")
        if said not in ("auto", used) and not any(o.startswith(prefixes) for o in overrides or []):
            return load_recipe(recipe, [f"{key}={said}", *(overrides or [])])
    OmegaConf.update(config, "aqn.profile", profile)
    parse_aqn(config)  # again, because some checks depend on the profile
    for key, count in _workers(int(config.trainer.nnodes)).items():
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, count)
    with open_dict(config):
        del config.aqn.experiment  # everything from the experiment is in the config now
    if config.trainer.experiment_name is None:
        config.trainer.experiment_name = path.stem
    return config


def _check_defaults(path: Path, raw: Any) -> None:
    """Raise ConfigError if a recipe's list of files is none, or comes over what the recipe itself says."""
    defaults = raw.get("defaults", []) if isinstance(raw, dict) else None
    if raw is not None and not isinstance(defaults, list):
        raise _without_base(path)
    names = [name for name in defaults or () if isinstance(name, str)]
    if "_self_" in names[:-1]:
        raise ConfigError(f"{path.name}: {names[-1]} in `defaults` would overwrite this file: put _self_ last")


def _workers(nodes: int) -> dict[str, int]:
    """Return the number of processes of each kind that verl distributes over nodes, for keys that are not set."""
    return {
        "actor_rollout_ref.rollout.agent.num_workers": 8 * nodes,
        "reward.num_workers": 8 * nodes,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": max(8, 2 * nodes),
    }


def _refuse_open(path: Path, raw: Any, overrides: list[str]) -> None:
    """Raise ConfigError if a recipe has `???` that no override sets; OmegaConf would keep the value from before."""
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for key, value in leaves(raw) if isinstance(raw, dict) else ():
        if value == "???" and key not in given:
            raise ConfigError(f"{path.name} has no value for {key} (???): set it")


def _groups(overrides: list[str]) -> tuple[str, str, list[str], list[str]]:
    """Split overrides: names of profile and experiment, Hydra's overrides that select these files, and the rest.

    A correction is selected in the same way.
    """
    chosen: dict[str, str | None] = {"profile": "auto", "experiment": None, "correction": None}
    rest = []
    for override in overrides:
        key, sep, value = override.partition("=")
        if not key or not sep:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        if key == "seeds":
            raise ConfigError("seeds= is for plans; for a recipe, set for example aqn.seed=0")
        key = key.removeprefix("aqn.") if key in ("aqn.profile", "aqn.experiment") else key
        if key in chosen:
            chosen[key] = value
        else:
            rest.append(override)
    profile = chosen["profile"] if chosen["profile"] not in (None, "auto") else detect_profile()
    usual = "embedded" if profile == "cpu" else "gsm8k"
    experiment = chosen["experiment"] if chosen["experiment"] not in (None, "auto") else usual
    conf = Path(__file__).resolve().parent / "conf"
    groups = []
    for group, name in (("profile", profile), ("experiment", experiment), ("correction", chosen["correction"])):
        if name is None:
            continue
        names = [p.stem for p in (conf / group).glob("*.yaml")]
        if name not in names:
            raise ConfigError(f"no {group} {name!r}: {nearest(name, names)}")
        # `base` includes the first two below the recipe's file; a correction is applied on top of the recipe.
        groups.append(f"+{group}={name}" if group == "correction" else f"{group}={name}")
    return profile, experiment, groups, rest


def _check_base(config: DictConfig, path: Path) -> None:
    """Check that a recipe builds on `base`; profile and experiment define only a part of these blocks."""
    if "profile" not in (config.get("aqn") or {}) or "project_name" not in (config.get("trainer") or {}):
        raise _without_base(path)


def _without_base(path: Path) -> ConfigError:
    return ConfigError(f"{path.name} does not build on `base`: start it with `defaults: [base, _self_]`")


def _check_blocks(config: Any, known: Any, path: Path, prefix: str = "") -> None:
    """Check that what is a block of keys in `known` is one in a recipe, before anything reads these keys."""
    for key, block in known.items():
        value = config.get(key, {})
        if not block or not isinstance(block, dict) or key.endswith("_kwargs"):
            continue
        if isinstance(value, str) and value.startswith("${"):  # a copy of another block
            continue
        if not isinstance(value, dict):
            shown = "null" if value is None else repr(value)
            raise ConfigError(f"{path.name}: {prefix}{key} must be a block of keys, got {shown}")
        _check_blocks(value, block, path, f"{prefix}{key}.")


def _check_keys(config: DictConfig, path: Path, groups: list[str], overrides: list[str]) -> None:
    """Check that every key in a recipe's file exists: Hydra checks the keys of overrides, but not those of the file.

    A block that is empty or null in verl or `base` may contain any key, as may arguments of a class (`…_kwargs`), and
    an override with + may add any key. `aqn` is checked by its types.
    """
    known, verls = _plain(find_recipe("base"), *groups), compose_verl()
    added = [override.lstrip("+").partition("=")[0] for override in overrides if override.startswith("+")]
    for names in _paths(OmegaConf.to_container(config)):
        key = ".".join(names)
        if names[0] == "aqn" or "_kwargs." in key or any(_within(key, one) or _within(one, key) for one in added):
            continue
        if _has(known, names) or _has(verls, names):
            continue
        if any("." in name for name in names):  # `aqn.noise.seed: 1` in a file is one key, which nothing reads
            block = ": {".join(key.split("."))
            raise ConfigError(f"{path.name}: {key} is no key: write {block}: …{'}' * key.count('.')}")
        raise ConfigError(f"{path.name}: {unknown_key(key, known)}")


@cache
def _plain(path: Path, *groups: str) -> Any:
    return OmegaConf.to_container(_compose(path, list(groups)))


def compose_verl() -> Any:
    """Return verl's own defaults as a plain dict, with unresolved interpolations. The result must not be modified."""
    return _plain(_verl_config_dir() / "ppo_trainer.yaml")


def compose_base(profile: str | None) -> Any:
    """Return `base` as a plain dict, with or without a profile. The result must not be modified."""
    return _plain(find_recipe("base"), *([f"profile={profile}"] if profile else []))


def _within(key: str, block: str) -> bool:
    return f"{key}.".startswith(f"{block}.")


def _has(block: Any, key: Sequence[str]) -> bool:
    if not key or block in (None, {}, []):
        return True
    return isinstance(block, dict) and key[0] in block and _has(block[key[0]], key[1:])


def unknown_key(key: str, known: Any) -> str:
    """Return the message for a key that `known` does not have, with the nearest valid key."""
    if reason := reason_against(key):
        return f"unknown key {key}: {reason}"
    *parents, name = key.split(".")
    block = known
    for parent in parents:
        block = block.get(parent) if isinstance(block, dict) else None
    siblings = [str(one) for one in (block or ())]
    elsewhere = [one for one in _dotted(known) if one.rpartition(".")[2] == name]
    if elsewhere and not difflib.get_close_matches(name, siblings):
        return f"unknown key {key}: did you mean {' or '.join(elsewhere[:4])}?"
    return f"unknown key {key}: {nearest(name, siblings)}"


def _compose(path: Path, overrides: list[str]) -> DictConfig:
    folders = [Path(__file__).resolve().parent / "conf", _verl_config_dir(), *recipe_dirs()]
    searchpath = ",".join(json.dumps(f"file://{folder}", ensure_ascii=False) for folder in folders)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(path.parent), version_base=None):
        try:
            return compose(config_name=path.stem, overrides=[f"hydra.searchpath=[{searchpath}]", *overrides])
        except yaml.YAMLError as error:  # a file that this one builds on
            mark = getattr(error, "problem_mark", None)
            raise _not_yaml(Path(mark.name) if mark else path, error) from error
        except ValueError as error:  # Hydra's own, about a list of files or a block that is none
            if isinstance(error, OmegaConfBaseException):
                raise
            raise ConfigError(f"{path.name}: {first_line(error)}") from error
        except RecursionError:
            raise ConfigError(
                f"{path.name} builds on itself: a name in `defaults` means first a file beside it, so give the file "
                "another name than the recipe that it builds on"
            ) from None


def _hydra_message(error: Exception, path: Path, groups: list[str]) -> str:
    """Return one line of Hydra's message; for a key that does not exist, with the nearest valid key."""
    cause = error.__cause__ or error.__context__ or error
    lines = [line.strip() for line in f"{cause}\n{error}".splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    if "is not in struct" in lines[0] and key:
        config = _compose(path, groups)
        _check_base(config, path)
        return unknown_key(key, OmegaConf.to_container(config))
    return lines[0] + (f" ({key})" if key and key not in lines[0] else "")


@cache
def followers(recipe: str, profile: str) -> dict[str, str]:
    """Return the settings of `recipe`, with either experiment, that copy another setting, with the key of that setting.

    A run's config.yaml is resolved and no longer contains this.
    """
    found = {}
    for experiment in ("embedded", "gsm8k"):
        raw: Any = OmegaConf.to_container(load_recipe(recipe, [f"profile={profile}", f"experiment={experiment}"]))
        for key in _dotted(raw):
            value = reduce(lambda block, part: block[part], key.split("."), raw)
            if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
                found[key] = match[1]
    return found


def _dotted(block: Any) -> Iterator[str]:
    """Yield all dotted keys, including those of blocks."""
    return map(".".join, _paths(block))


def _paths(block: Any, *above: str) -> Iterator[tuple[str, ...]]:
    """Yield the names on the way to every key, including those of blocks."""
    for key, value in block.items() if isinstance(block, dict) else ():
        yield (*above, str(key))
        yield from _paths(value, *above, str(key))
