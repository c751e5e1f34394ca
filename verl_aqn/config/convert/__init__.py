"""From a launch of verl's `main_ppo` to a recipe: `verl-aqn convert`."""
