#!/usr/bin/env bash
# E12: σ 0.05 → 5e-4, epoch_aware as intended, one epoch.
#   bash scripts/test_mxfp4_e12_1ep.sh [N_DEVICES] [key=value …] [--fresh] [--dry-run]
MODEL_PATH=${MODEL_PATH:-}     # a folder or hub name; default: the profile's
TRAIN_DATA=${TRAIN_DATA:-}     # parquet, JSON or JSON lines; default: GSM8K on accelerators, the embedded task on a CPU
VAL_DATA=${VAL_DATA:-}
PROFILE=${PROFILE:-auto}       # cpu, cuda, npu
RUN_DIR=${RUN_DIR:-/tmp/mxfp4_e12_1ep}
RECIPE=e12
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"
