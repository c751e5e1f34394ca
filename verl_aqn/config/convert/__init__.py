"""`verl-aqn convert`: convert a launch of verl's `main_ppo` to a recipe."""
