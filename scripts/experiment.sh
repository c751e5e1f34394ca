#!/usr/bin/env bash
# Sets the machine up and runs the experiment $RECIPE. Called by the test_mxfp4_*.sh scripts, which hold the toggles.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

overrides=("profile=$PROFILE")
[[ -n $RUN_DIR ]] && overrides+=("aqn.run.dir=$RUN_DIR")
[[ -n $MODEL_PATH ]] && overrides+=("actor_rollout_ref.model.path=$MODEL_PATH")
[[ -n $TRAIN_DATA ]] && overrides+=("data.train_files=$TRAIN_DATA")
[[ -n $VAL_DATA ]] && overrides+=("data.val_files=$VAL_DATA")
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    overrides+=("trainer.n_gpus_per_node=$1")
    shift
fi

PROFILE=$PROFILE bash scripts/setup.sh
exec .venv/bin/verl-aqn train "$RECIPE" "${overrides[@]}" "$@"
