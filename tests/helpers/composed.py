"""Recipes with overrides, for tests that need many: each is composed once, because that takes almost a second."""

import copy
from functools import cache

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.compose import load_recipe


@cache
def _composed(recipe: str, *chosen: str) -> DictConfig:
    return load_recipe(recipe, ["profile=cpu", *chosen])


def recipe_with(recipe: str, *overrides: str) -> DictConfig:
    """Return the recipe on a CPU with `overrides` (one key each), without the value checks of `load_recipe`."""
    groups = [one for one in overrides if one.startswith(("experiment=", "correction="))]
    config = copy.deepcopy(_composed(recipe, *groups))
    OmegaConf.set_struct(config, False)
    config.merge_with_dotlist([one.lstrip("+") for one in overrides if one not in groups])
    return config
