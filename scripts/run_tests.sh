#!/usr/bin/env bash
# Everything that must hold: lint, types, unit, contract and integration tests. Needs no accelerator.
#   bash scripts/run_tests.sh                      everything
#   bash scripts/run_tests.sh quick                lint, types, and the unit tests that tests/slow.txt does not name
#   bash scripts/run_tests.sh PYTEST_ARGUMENTS     lint, types, and the tests that the arguments name
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
unset PYTHONDONTWRITEBYTECODE
if [[ ${1:-} == quick ]]; then
    OMP_NUM_THREADS=1 exec .venv/bin/pytest -n logical --dist loadfile --quick tests/unit "${@:2}"
fi
if (($#)); then exec .venv/bin/pytest "$@"; fi
# The report's test opens it in a browser.
if ! command -v chromium chromium-browser google-chrome > /dev/null; then
    if [[ $EUID == 0 ]] && command -v apt-get > /dev/null; then
        echo "run_tests: installing chromium" >&2
        install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium > /dev/null; }
        install || { apt-get update -qq && install; }
    else
        echo "run_tests: no browser for the report's test: install chromium (apt-get install chromium, as root)" >&2
        exit 1
    fi
fi
# Small tests side by side, one on each core; then real runs, which want the machine for themselves.
OMP_NUM_THREADS=1 .venv/bin/pytest -n logical --dist loadscope tests/unit tests/contract
exec .venv/bin/pytest tests/integration
