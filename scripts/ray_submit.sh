#!/usr/bin/env bash
# Runs a recipe on the Ray cluster whose head is this machine, and shows its output. Ctrl-C asks before stopping the job.
#   bash scripts/ray_submit.sh RECIPE [key=value …] [--fresh]
# The run folder, VERL_AQN_CACHE, model and data must be on a disk that all nodes share.
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
exec verl-aqn submit "$@"
