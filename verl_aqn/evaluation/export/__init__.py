"""Export of a run's checkpoint for PEFT, vLLM and transformers.

Read `verl_aqn.evaluation.export.exporting.export` first.
"""
