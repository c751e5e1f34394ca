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
# The report's test opens the report in a browser.
if ! command -v chromium chromium-browser google-chrome > /dev/null; then
    if [[ $EUID == 0 ]] && command -v apt-get > /dev/null; then
        echo "run_tests: installing chromium" >&2
        install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium > /dev/null; }
        install || { apt-get update -qq && install; }
    else
        echo "run_tests: the report's test needs a browser: install chromium (as root: apt-get install chromium)" >&2
        exit 1
    fi
fi
# Small tests run in parallel, one on each core. Real runs follow, which need the whole machine.
OMP_NUM_THREADS=1 .venv/bin/pytest -n logical --dist loadscope tests/unit tests/contract
exec .venv/bin/pytest tests/integration
