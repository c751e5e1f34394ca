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
exec .venv/bin/pytest "$@"
