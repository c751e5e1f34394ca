#!/usr/bin/env bash
# Makes .venv with the pinned versions. Does nothing when nothing has changed.
#   bash scripts/setup.sh            profile by what is on the machine
#   PROFILE=cpu|cuda|npu             forces one
#   PYTHON=python3.11                the interpreter to build from
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

profile=${PROFILE:-auto}
if [[ $profile == auto ]]; then
    if command -v npu-smi > /dev/null 2>&1; then profile=npu
    elif command -v nvidia-smi > /dev/null 2>&1 && nvidia-smi > /dev/null 2>&1; then profile=cuda
    else profile=cpu; fi
fi
[[ $profile =~ ^(cpu|cuda|npu)$ ]] || die "PROFILE=$profile is not one of cpu, cuda, npu, auto"

lock=scripts/requirements-cpu.lock
stamp=.venv/.verl-aqn-setup
# Where the checkout stands is part of the stamp: an editable install points there.
want=$( { echo "$profile $PWD"; cat pyproject.toml scripts/*.lock scripts/setup.sh scripts/vllm-metadata/pyproject.toml; } | sha256sum)
[[ -f $stamp && $(cat "$stamp") == "$want" ]] && exit 0

python=${PYTHON:-}
if [[ -z $python ]]; then
    for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2> /dev/null; then
            python=$candidate
            break
        fi
    done
fi
[[ -n $python ]] || die "needs Python 3.11 or 3.12; set PYTHON to one"

say "installing profile $profile into .venv (about a minute on a fast connection)"
# Compiled files are wanted: some ten processes import verl, each 6 s slower without them.
unset PYTHONDONTWRITEBYTECODE
see_system=()
[[ $profile == npu ]] && see_system=(--system-site-packages)
[[ -x .venv/bin/python ]] || "$python" -m venv ${see_system[@]+"${see_system[@]}"} .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9" 2>&1 | grep -v '^WARNING' >&2 || true
uv() { .venv/bin/uv pip "$@" --quiet --python .venv ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}; }

if [[ $profile == cpu ]]; then
    # Without dependency resolution: the lock is complete, and four declared packages must stay away (lock.sh).
    grep -v '^torch==' "$lock" > .venv/requirements.txt
    uv install --no-deps --compile-bytecode -r .venv/requirements.txt
    torch=$(grep '^torch==' "$lock")
    if compgen -G "${PIP_FIND_LINKS:-/nonexistent}/torch-${torch#torch==}+cpu-*" > /dev/null; then
        uv install --no-deps --compile-bytecode "$torch+cpu"
    else
        uv install --no-deps --compile-bytecode --torch-backend cpu "$torch"
    fi
    # The registry's torchvision is built for CUDA. Its Python part is what vLLM needs of it; this file alone asks for
    # the compiled part on import. A new file, since uv may have linked the old one to its cache.
    shapes=(.venv/lib/python3.*/site-packages/torchvision/_meta_registrations.py)
    rm "${shapes[0]}"
    echo "# Emptied by scripts/setup.sh: the operators are not there on a CPU." > "${shapes[0]}"
    uv install --no-deps ./scripts/vllm-metadata
    # The oracle of the MXFP4 tests, outside the environment: PEFT imports torchao wherever it finds it, which
    # would cost every process of a run seven seconds.
    uv install --no-deps --target .venv/oracles torchao==0.18.0
    # Trackers that verl can log to, for their test: outside the environment, because some declare older versions of
    # what is in it (protobuf, pillow) than they run with.
    uv install --no-deps --target .venv/trackers -r scripts/requirements-trackers.lock
    # What the NPU's contract tests read; the compiled parts, three quarters of it, are of no use here.
    uv install --no-deps --only-binary :all: --python-platform x86_64-manylinux_2_40 --target .venv/contracts \
        -r scripts/requirements-contracts.lock
    find .venv/contracts -name '*.so*' -delete
elif [[ $profile == npu ]]; then
    .venv/bin/python - scripts/requirements-npu.lock >&2 << 'END' || die "see the file's head; verl's images for Ascend hold the set, its scripts/install_vllm_mcore_npu.sh makes it"
import importlib.metadata, sys
missing = 0
for line in open(sys.argv[1]):
    name, _, version = line.partition("#")[0].strip().partition("==")
    try:
        found = name and importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        found = "not there"
    if found != version:
        missing += 1
        print(f"setup: {name} {version} is needed, and is {found} for {sys.executable}: set PYTHON to one that has it")
sys.exit(missing > 0)
END
    # pip, and not uv, which does not see what the system has. Not [dev]: triton would overwrite triton-ascend.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[npu]" "pytest>=8" "pytest-timeout>=2.3"
else
    uv install -e ".[$profile,dev]"
fi
uv install --no-deps -e .
# Compiles the MXFP4 kernels for this CPU; without a compiler plain PyTorch computes the same bits.
.venv/bin/python -c 'from verl_aqn.mxfp4.kernels import native; print("setup: MXFP4 kernels:", native.status().detail)' >&2
.venv/bin/python -c 'import torch; print(f"setup: torch {torch.__version__}", flush=True)' >&2
echo "$want" > "$stamp"
