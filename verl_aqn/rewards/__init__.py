"""Public names of the rewards, for recipes and checks from outside; the code is in `verl_aqn.tasks`."""
