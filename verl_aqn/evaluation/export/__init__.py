"""A run's checkpoint as others load it; read `verl_aqn.evaluation.export.exporting.export` first."""
