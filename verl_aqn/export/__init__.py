"""A run's checkpoint as others load it; read `verl_aqn.export.exporting.export` first."""
