#!/usr/bin/env bash
# Sets up the machine and runs the experiment $RECIPE. Called by the test_mxfp4_*.sh scripts, which set the options.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)  # no cd for the run: paths are relative to the user's folder

overrides=("profile=$PROFILE")
# key=value for Hydra, which would split a path like lr=1,seed=0 unless it is quoted.
path() { [[ -z $2 ]] || overrides+=("$1='${2//\'/\\\'}'"); }
path aqn.run.dir "$RUN_DIR"
path actor_rollout_ref.model.path "$MODEL_PATH"
path data.train_files "$TRAIN_DATA"
path data.val_files "$VAL_DATA"
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    overrides+=("trainer.n_gpus_per_node=$1")
    shift
fi

PROFILE=$PROFILE bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/verl-aqn" train "$RECIPE" "${overrides[@]}" "$@"
