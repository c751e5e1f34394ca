"""Decide which settings of a verl launch go into a recipe, under which name, and why others do not."""

import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_aqn.config.allowed import check_names
from verl_aqn.config.compose import compose_base, compose_verl, load_recipe, read_yaml, unknown_key
from verl_aqn.config.convert.launch_script import Command, Script, Word
from verl_aqn.config.verl_keys import leaves, rules_of
from verl_aqn.errors import ConfigError, first_line

MAIN = "verl.trainer.main_ppo"
# DAPO's entry point is main_ppo with group filtering
_ENTRIES = (MAIN, "recipe.dapo.main_dapo", "recipe.dapo.src.main_dapo")
_CONFIGS = ("ppo_trainer", "dapo_trainer")
_OPTIONS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
_HOME = "verl-aqn-home/"  # Hydra allows no ~ in a value
# names and paths, which do not change a run's result
_NAMES = ("trainer.experiment_name", "trainer.project_name", "trainer.default_local_dir")
STATUSES = ("kept", "renamed", "ours", "default", "refused", "unknown")


@dataclass
class Setting:
    """One setting of the launch and what became of it.

    `status`: `kept`; `renamed` (kept as `to`); `ours` (the recipe's base has the same value, or a fixed value for all
    runs); `default` (not in the launch: verl's default, written down because base differs); `refused`; `unknown` (the
    value cannot be read from the script alone). `why` is for the last two and for `ours`; `line` is 0 for a setting
    that is not in the script.
    """

    key: str
    value: Any
    line: int = 0
    status: str = "kept"
    to: str = ""
    why: str = ""
    added: bool = False
    """Whether the launch adds the key to verl's config with +."""

    @property
    def name(self) -> str:
        """Return the key in the recipe."""
        return self.to or self.key


@dataclass
class Conversion:
    """The settings of a launch, from which a recipe is written."""

    source: str
    settings: list[Setting]
    profile: str = "auto"
    notes: list[str] = field(default_factory=list)

    def having(self, *statuses: str) -> list[Setting]:
        """Return the settings with these statuses."""
        return [one for one in self.settings if one.status in statuses]

    def to_dict(self) -> dict[str, Any]:
        """Return the conversion as values for JSON."""
        counts = {status: len(self.having(status)) for status in STATUSES}
        settings = [{k: v for k, v in asdict(one).items() if k != "added"} for one in self.settings]
        return {"source": self.source, "counts": counts, "notes": self.notes, "settings": settings}

    def recipe(self, *, open_: bool = True) -> str:
        """Return the recipe as YAML.

        `open_`: write `???`, to be filled in, for values that the launch alone does not contain.
        """
        block: dict[str, Any] = {}
        for one in self.having("kept", "renamed", "default"):
            _put(block, one.name, one.value)
        for one in self.having("unknown") if open_ else ():
            if one.name not in _NAMES and any(rule.kind == "passed" for rule in rules_of(one.name)):
                _put(block, one.name, "???")
        aqn = block.pop("aqn", {})
        noted = [f"# not expanded: {one.key}={one.value} ({one.why})\n" for one in self.having("unknown")]
        head = (
            f"# From {self.source} by `verl-aqn convert`.\n"
            "# Includes verl's defaults for settings that are not in the launch and that base would change.\n"
        )
        profile = {} if self.profile == "auto" else {"profile": self.profile}
        body = {"defaults": ["base", "_self_"], **block, "aqn": {"experiment": "none", **profile, **aqn}}
        return head + "".join(noted) + yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120)


def convert(source: Sequence[str], environment: Mapping[str, str] = os.environ) -> Conversion:
    """Read a launch and sort its settings.

    Args:
        source: a shell script with its arguments, a YAML file of a resolved config, or the words of a command (or
            one text that contains them).
        environment: of the script; variables that neither the environment nor the script sets are not guessed.

    Raises:
        ConfigError: there is no launch of `main_ppo`, or more than one, or the recipe would not compose.
    """
    file = Path(source[0]).expanduser()
    notes: list[str] = []
    if file.suffix in (".yaml", ".yml"):
        name, settings = file.name, _of_config(file)
    elif file.is_file():
        name = file.name
        settings, notes = _of_script(_read(file), source[1:], environment, name)
    else:
        if not any(entry in word for word in source for entry in _ENTRIES):
            raise ConfigError(f"{source[0]} is neither a file nor a command with {MAIN}")
        name, text = "a command", source[0] if len(source) == 1 else shlex.join(source)
        settings, notes = _of_script(text, (), environment, name)
    made = Conversion(name, settings, notes=notes)
    _sort(made)
    _check(made)
    return made


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {first_line(error)}") from error


def _of_config(file: Path) -> list[Setting]:
    """Return every value of a resolved config (Hydra's config.yaml, or what verl prints) that is not verl's default."""
    if not file.is_file():
        raise ConfigError(f"{file} does not exist: correct the path")
    raw = read_yaml(file)
    if not isinstance(raw, dict) or "actor_rollout_ref" not in raw:
        raise ConfigError(f"{file} is not a config of verl's main_ppo: it has no actor_rollout_ref")
    if "aqn" in raw:
        raise ConfigError(f"{file} is already a config of verl-aqn")
    verls, said = compose_verl(), dict(leaves(raw))
    follows = {key for key in said if isinstance(usual := _select(verls, key), str) and "${" in usual}
    config = OmegaConf.create(verls)
    for key in said.keys() - follows:
        OmegaConf.update(config, key, said[key], force_add=True)
    found = []
    for key, value in said.items():
        # A value that follows another setting in verl follows it in the recipe too.
        usual = _resolved(config, key) if key in follows else _select(verls, key)
        nothing = usual is ... and value in (None, {}, [], False, 0)  # an empty value under a key of an older version
        if usual != value and not nothing and not key.endswith("_target_"):
            found.append(Setting(key, value))
    return found


def _resolved(config: DictConfig, key: str) -> Any:
    try:
        value = OmegaConf.select(config, key, default=...)
    except OmegaConfBaseException:  # it refers to a setting of another engine
        return ...
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _of_script(
    text: str, arguments: Sequence[str], environment: Mapping[str, str], name: str
) -> tuple[list[Setting], list[str]]:
    script = Script(text, arguments, environment)
    launches = [command for command in script.commands if _launch(command) is not None]
    if not launches:
        modules = [w.text for c in script.commands for w in c.words if re.search(r"\bmain_|trainer", w.text)]
        other = f" (it starts {modules[0]})" if modules else ""
        raise ConfigError(f"{name} has no launch of {MAIN}{other}")
    if len(launches) > 1:
        lines = ", ".join(str(command.words[0].line) for command in launches)
        raise ConfigError(f"{name} has {len(launches)} launches of {MAIN} (lines {lines}): give one as a command")
    settings: list[Setting] = []
    notes: list[str] = []
    words = iter(launches[0].words[_launch(launches[0]) :])
    for word in words:
        if word.text.startswith("-"):
            option, given, value = word.text.partition("=")
            if not given and option in _OPTIONS:
                value = next(words, word).text
            if option in ("--config-name", "-cn") and value.removesuffix(".yaml") not in _CONFIGS:
                notes.append(
                    f"line {word.line}: the settings of {option}={value} are not in the script: to convert all "
                    "of them, resolve the config with `--cfg job --resolve` and convert that file"
                )
            continue
        if not word.text.strip():
            continue
        settings.append(_setting(word))
    last = {one.key: number for number, one in enumerate(settings)}  # as in Hydra, the last word counts
    return [one for number, one in enumerate(settings) if last[one.key] == number], notes


def _launch(command: Command) -> int | None:
    """Return the index of the first setting among the words of a launch, or None if the command is not a launch."""
    for number, word in enumerate(command.words):
        if word.text in _ENTRIES or word.text.endswith(("trainer/main_ppo.py", "main_dapo.py")):
            return number + 1
    return None


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _setting(word: Word) -> Setting:
    """Parse a word `key=value` as Hydra does."""
    key, sep, text = word.text.partition("=")
    name = key.lstrip("+~")
    if not sep or not re.fullmatch(r"[\w.@/-]+", name):
        why = word.problem or f"line {word.line}: not of the form key=value"
        return Setting(word.text, None, word.line, "unknown", why=why)
    if word.problem:
        return Setting(name, text, word.line, "unknown", why=word.problem)
    try:
        value: Any = _parser().parse_override(word.text.replace("~/", _HOME)).value()
    except HydraException as error:
        return Setting(
            name, text, word.line, "unknown", why=f"line {word.line}: Hydra cannot read {text}: {first_line(error)}"
        )
    return Setting(name, _plain(value), word.line, added=key.startswith("+"))


def _plain(value: Any) -> Any:
    """Convert Hydra's values to YAML's."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    return getattr(value, "text", str(value)).replace(_HOME, "~/")


@cache
def _table() -> Any:
    return yaml.safe_load(Path(__file__).with_name("old_names.yaml").read_text(encoding="utf-8"))


def _within(key: str, pattern: str) -> bool:
    block = pattern.removesuffix(".*")
    return key == block or (pattern != block and key.startswith(f"{block}."))


def _rename(one: Setting, devices: int | None) -> None:
    """Give a setting its name in verl 0.9.1."""
    table = _table()
    for pattern, to in table["renamed"].items():
        if _within(one.key, pattern):
            one.to, one.status = to + one.key[len(pattern.removesuffix(".*")) :], "renamed"
            break
    if one.key in table["per_device"] and one.value is not None and one.status != "unknown":
        if devices is None or type(one.value) is not int or one.value % devices:
            one.status, one.why = "refused", "it counts for all devices together and is not divisible by their number"
            return
        one.to, one.status, one.value = table["per_device"][one.key], "renamed", one.value // devices
    for pattern, why in table["gone"].items():
        if _within(one.name, pattern):
            one.status, one.why = "ours", why


def _sort(made: Conversion) -> None:
    """Give each setting its status, and add verl's defaults that `base` would change."""
    said = {one.key: one for one in made.settings if one.status != "unknown"}
    device = said.get("trainer.device")
    npu = device is not None and device.value == "npu"
    made.profile = "npu" if npu else "auto"
    base = compose_base("npu" if npu else "cuda")
    ranks = [
        said[key].value if key in said else usual
        for key, usual in (("trainer.n_gpus_per_node", 8), ("trainer.nnodes", 1))
    ]
    devices = ranks[0] * ranks[1] if all(type(rank) is int for rank in ranks) else None
    for one in made.settings:
        unknown = one.status == "unknown"
        _rename(one, devices)
        one.status = "unknown" if unknown else one.status
    _decide_model(made, said)
    for one in [one for one in made.settings if one.status in ("kept", "renamed")]:
        _place(one, base)
    _fill(made, base)
    config = OmegaConf.create(base)
    for one in made.having("kept", "renamed", "default"):
        OmegaConf.update(config, one.name, one.value, force_add=True)
    for one in made.having("kept", "renamed"):
        _refuse(one, config, base)
    for one in made.having("kept", "renamed"):
        if one.name != "trainer.n_gpus_per_node" and _select(base, one.name) == one.value:  # a profile may change it
            one.status, one.why = "ours", one.why or "base has the same value"


def _decide_model(made: Conversion, said: dict[str, Setting]) -> None:
    """Decide about adapters and the critic's base if the launch trains all weights."""
    rank = next((one for one in made.settings if one.name == "actor_rollout_ref.model.lora_rank"), None)
    adapter = "actor_rollout_ref.model.lora_adapter_path" in said
    if (rank is None or rank.value == 0) and not adapter:
        if rank:
            rank.status, rank.why = "ours", "a packed base is trained with an adapter"
        made.notes.append(
            "the launch trains all weights: the recipe trains an adapter of rank 32 on the packed base "
            "instead, for which the learning rate is usually ten times higher"
        )
    model = said.get("actor_rollout_ref.model.path")
    if all(one.name != "actor_rollout_ref.model.path" for one in made.settings):
        made.settings.append(
            Setting("actor_rollout_ref.model.path", None, 0, "unknown", why="the launch names no model")
        )
    for one in made.settings:
        if one.key == "critic.model.path" and one.status == "kept":
            same = model is not None and one.value == model.value
            one.status = "ours" if same else "refused"
            one.why = "the critic uses the actor's base"
        elif one.key == "trainer.device":
            one.status, one.why = "ours", "the profile decides the device"
        elif one.key == "actor_rollout_ref.rollout.load_format" and "dummy" in str(one.value):
            one.status, one.why = "ours", "vLLM reads the base from disk"
        elif one.key == "actor_rollout_ref.rollout.mode":
            one.status, one.why = "ours", "verl has no other rollout mode any more"
        elif one.key == "algorithm.filter_groups.max_num_gen_batches" and not one.value:
            one.status, one.why = "refused", "groups without variance would be replaced without limit; base has 10"


def _place(one: Setting, base: Any) -> None:
    """Refuse a setting that verl 0.9.1 does not have."""
    if rules_of(one.name) or one.name.startswith("aqn."):
        return
    free = any(_empty(block, one.name) for block in (base, compose_verl())) or "_kwargs." in one.name
    if not free:
        what = "verl 0.9.1's config does not have it" if one.added else unknown_key(one.name, compose_verl())
        one.status, one.why = "refused", what


def _fill(made: Conversion, base: Any) -> None:
    """Add verl's default for settings that are not in the launch and that `base` sets otherwise."""
    verls, said = compose_verl(), {one.name: one for one in made.settings if one.status != "refused"}
    ours, estimator = _table()["ours"].split(), said.get("algorithm.adv_estimator")
    if estimator and estimator.value != "gae" and "critic.enable" not in said:
        ours.append("critic.*")  # there is no critic
    for key, value in leaves(base):
        if key in said or any(_within(key, pattern) for pattern in ours):
            continue
        usual = _select(verls, key)
        if usual is not ... and usual != value and not _is_profile_s(key):
            made.settings.append(Setting(key, usual, status="default"))
    if "reward.reward_kwargs.overlong_buffer_cfg.enable" not in said:
        made.settings.append(Setting("reward.reward_kwargs.overlong_buffer_cfg.enable", False, status="default"))


def _is_profile_s(key: str) -> bool:
    """Return whether a device profile sets the key, so that it is not part of the algorithm."""
    return _select(compose_base(None), key) == _select(compose_verl(), key)


def _refuse(one: Setting, config: DictConfig, base: Any) -> None:
    """Refuse what the table of keys refuses in the resulting recipe; settings with a fixed value stay `ours`."""
    if _select(base, one.name) == one.value:
        return
    for rule in rules_of(one.name):
        if rule.kind == "passed" or rule.accepts(one.value, config) or not rule.holds(config):
            if rule.by != "config.check_names":
                continue
            try:
                check_names(OmegaConf.create(_nested(one.name, one.value)))
            except ConfigError as error:
                one.status, one.why = "refused", str(error).partition(": ")[2]
            continue
        verls = _select(compose_verl(), one.name)
        said_nothing = one.value == verls or (verls is ... and one.value in (None, False))
        one.status = "ours" if rule.kind == "owned" or said_nothing else "refused"
        one.why = rule.reason
        return


def _check(made: Conversion) -> None:
    """Compose the recipe as `train` would. Settings that are still refused are removed, with the reason."""
    profile = "cuda" if made.profile == "auto" else made.profile
    for _ in range(len(made.settings)):
        with tempfile.TemporaryDirectory(prefix="verl-aqn-convert-") as folder:
            (file := Path(folder) / "recipe.yaml").write_text(made.recipe(open_=False), encoding="utf-8")
            try:
                load_recipe(str(file), [f"profile={profile}"])
                return
            except ConfigError as error:
                text = str(error).removeprefix("recipe.yaml: ")
                named = [
                    one
                    for one in made.having("kept", "renamed", "default")
                    if re.search(rf"{re.escape(one.name)}\b", text)
                ]
                if not named:
                    raise ConfigError(f"{made.source} cannot be converted to a recipe: {text}") from error
                one = max(named, key=lambda setting: len(setting.name))
                one.status, one.why = "refused", text.partition(": ")[2] or text


def _empty(block: Any, key: str) -> bool:
    """Return whether `key` is in a block that is empty by default, in which any key is allowed."""
    for part in key.split("."):
        if block in (None, {}):
            return True
        if not isinstance(block, dict) or part not in block:
            return False
        block = block[part]
    return False


def _select(block: Any, key: str) -> Any:
    for part in key.split("."):
        block = block.get(part, ...) if isinstance(block, dict) else ...
    return block


def _nested(key: str, value: Any) -> dict[str, Any]:
    block: dict[str, Any] = {}
    _put(block, key, value)
    return block


def _put(block: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        inner = block.get(parent)
        block[parent] = inner if isinstance(inner, dict) else {}
        block = block[parent]
    block[name] = value
