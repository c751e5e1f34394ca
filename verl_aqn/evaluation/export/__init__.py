"""Export of a run's checkpoint for PEFT, vLLM and transformers; read `verl_aqn.evaluation.export.exporting.export` first."""
