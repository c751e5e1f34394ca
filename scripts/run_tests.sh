#!/usr/bin/env bash
# Everything that must hold: lint, types, unit, contract and integration tests. Needs no accelerator.
#   bash scripts/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
unset PYTHONDONTWRITEBYTECODE
if (($#)); then exec .venv/bin/pytest "$@"; fi
# Small tests side by side, one on each core; then real runs, which want the machine for themselves.
OMP_NUM_THREADS=1 .venv/bin/pytest -n logical --dist loadscope tests/unit tests/contract
exec .venv/bin/pytest tests/integration
