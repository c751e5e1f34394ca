#!/usr/bin/env bash
# Tries other versions of the packages that this one builds on, without changing .venv: lists the private places of theirs
# whose source differs from the recorded one, and runs the tests that guard them.
#   bash scripts/check_hosts.sh verl==0.9.0 [PACKAGE==VERSION...] [-- PYTEST_ARGUMENTS]
set -euo pipefail
cd "$(dirname "$0")/.."

packages=()
while (($#)) && [[ $1 != -- ]]; do packages+=("$1"); shift; done
if ((${#packages[@]} == 0)); then
    echo "usage: bash scripts/check_hosts.sh verl==VERSION [PACKAGE==VERSION...] [-- PYTEST_ARGUMENTS]" >&2
    exit 2
fi
(($#)) && shift
bash scripts/setup.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/uv pip install --quiet --python .venv --no-deps --target "$folder" "${packages[@]}"
export PYTHONPATH="$folder:$PWD:$PWD/tests/helpers/any_version" VERL_PLATFORM=cpu
changed=0
.venv/bin/python -m tests.helpers.seams || changed=$?
# Left out: the tests that say which versions are admitted, and that the sources are the recorded ones.
.venv/bin/pytest -q "${@:-tests/contract}" --ignore tests/contract/test_plugin.py \
    --ignore tests/contract/test_pins.py \
    --deselect tests/contract/test_seam_list.py::test_the_hosts_sources_are_those_that_were_read
exit $changed
