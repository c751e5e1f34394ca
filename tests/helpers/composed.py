"""Recipes with overrides for tests that want many: composed once, as that takes most of a second."""

import copy
from functools import cache

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.compose import load_recipe


@cache
def _composed(recipe: str, *chosen: str) -> DictConfig:
    return load_recipe(recipe, ["profile=cpu", *chosen])


def recipe_with(recipe: str, *overrides: str) -> DictConfig:
    """The recipe on a CPU with `overrides` (of one key each), whose values are not checked as `load_recipe` does."""
    groups = [one for one in overrides if one.startswith(("experiment=", "correction="))]
    config = copy.deepcopy(_composed(recipe, *groups))
    OmegaConf.set_struct(config, False)
    config.merge_with_dotlist([one.lstrip("+") for one in overrides if one not in groups])
    return config
