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
# The report's test opens the report in a browser. The cluster's test makes a slow disk with FUSE.
missing=()
command -v chromium chromium-browser google-chrome > /dev/null || missing+=(chromium)
[[ $(/sbin/ldconfig -p) == *libfuse3.so* ]] || missing+=(fuse3)
if ((${#missing[@]})); then
    if [[ $EUID == 0 ]] && command -v apt-get > /dev/null; then
        echo "run_tests: installing ${missing[*]}" >&2
        install() { DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" > /dev/null; }
        install "${missing[@]}" || { apt-get update -qq && install "${missing[@]}"; }
    else
        echo "run_tests: the tests need ${missing[*]} (as root: apt-get install ${missing[*]})" >&2
        exit 1
    fi
fi
# Real runs leave a core idle for much of their time. Small tests take it, with the lowest priority; the benchmark's test
# follows alone. Linux shares time between sessions first, hence `setsid` and the session's own priority.
outputs=$(mktemp -d)
OMP_NUM_THREADS=1 setsid nice -n 19 bash -c '
    { echo 19 > /proc/self/autogroup; } 2> /dev/null
    exec .venv/bin/pytest -n logical --dist loadscope tests/unit tests/contract' > "$outputs/small" 2>&1 &
session=$!
trap 'kill -- -$session 2> /dev/null || true; rm -rf "$outputs"' EXIT
failed=0
.venv/bin/pytest tests/integration --ignore tests/integration/test_speed.py --durations=30 2>&1 \
    | tee "$outputs/integration" || failed=1
wait "$session" || failed=1
cat "$outputs/small"
.venv/bin/pytest tests/integration/test_speed.py 2>&1 | tee "$outputs/speed" || failed=1
# Three suites print one after the other: who reads only the end still sees what failed, and why.
if ((failed)); then
    echo "run_tests: what failed:"
    grep -hE '^(E  |_{3,} )' "$outputs"/* | grep -v 'leaked' | cut -c1-300 | tail -n 60 || true
    grep -hE '^(FAILED|ERROR) ' "$outputs"/* | cut -c1-300 || true
fi
exit $failed
