#!/usr/bin/env bash
# E12 over two epochs, epoch_aware.
#   bash scripts/test_mxfp4_e12_2ep.sh [N_DEVICES] [key=value …] [--fresh] [--dry-run]
MODEL_PATH=${MODEL_PATH:-}     # a folder or hub name; default: the profile's
TRAIN_DATA=${TRAIN_DATA:-}     # parquet, JSON or JSON lines; default: GSM8K on accelerators, the embedded task on a CPU
VAL_DATA=${VAL_DATA:-}
PROFILE=${PROFILE:-auto}       # cpu, cuda, npu
RUN_DIR=${RUN_DIR:-/tmp/mxfp4_e12_2ep}
RECIPE=e12_2ep
source "$(dirname "${BASH_SOURCE[0]}")/experiment.sh"
