#!/usr/bin/env bash
# Creates .venv with the pinned versions. Does nothing if nothing has changed.
#   bash scripts/setup.sh            chooses the profile by the machine's devices
#   PROFILE=cpu|cuda|npu             sets the profile
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
[[ $profile =~ ^(cpu|cuda|npu)$ ]] || die "PROFILE=$profile is not valid: use cpu, cuda, npu or auto"

lock=scripts/requirements-cpu.lock
stamp=.venv/.verl-aqn-setup
# The path of the checkout is part of the stamp, because an editable install refers to it.
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
[[ -n $python ]] || die "Python 3.11 or 3.12 is needed: set PYTHON to its path"

say "installing profile $profile into .venv (about a minute on a fast connection)"
# Compile bytecode: about ten processes import verl, and each is 6 s slower without it.
unset PYTHONDONTWRITEBYTECODE
see_system=()
[[ $profile == npu ]] && see_system=(--system-site-packages)
[[ -x .venv/bin/python ]] || "$python" -m venv ${see_system[@]+"${see_system[@]}"} .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.9" 2>&1 | grep -v '^WARNING' >&2 || true
uv() { .venv/bin/uv pip "$@" --quiet --python .venv ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}; }

if [[ $profile == cpu ]]; then
    # No dependency resolution: the lock is complete, and some declared packages must not be installed (lock.sh).
    grep -v '^torch==' "$lock" > .venv/requirements.txt
    uv install --no-deps --compile-bytecode -r .venv/requirements.txt
    torch=$(grep '^torch==' "$lock")
    if compgen -G "${PIP_FIND_LINKS:-/nonexistent}/torch-${torch#torch==}+cpu-*" > /dev/null; then
        uv install --no-deps --compile-bytecode "$torch+cpu"
    else
        uv install --no-deps --compile-bytecode --torch-backend cpu "$torch"
    fi
    # The registry's torchvision is built for CUDA. vLLM needs only its Python part, and only this file imports the
    # compiled part. It is replaced, not edited, because uv may have hard-linked it to its cache.
    shapes=(.venv/lib/python3.*/site-packages/torchvision/_meta_registrations.py)
    rm "${shapes[0]}"
    echo "# Emptied by scripts/setup.sh: these operators do not exist on a CPU." > "${shapes[0]}"
    uv install --no-deps ./scripts/vllm-metadata
    # torchao is a reference for the MXFP4 tests. It is installed outside the environment, because PEFT would import it
    # in each process of a run, which costs seven seconds.
    uv install --no-deps --target .venv/oracles torchao==0.18.0
    # Experiment trackers for their test. They are installed outside the environment, because some declare older versions
    # of its packages (protobuf, pillow) than they work with.
    uv install --no-deps --target .venv/trackers -r scripts/requirements-trackers.lock
    # Packages that the NPU contract tests read. Their compiled parts, three quarters of the size, are not used here.
    uv install --no-deps --only-binary :all: --python-platform x86_64-manylinux_2_40 --target .venv/contracts \
        -r scripts/requirements-contracts.lock
    find .venv/contracts -name '*.so*' -delete
elif [[ $profile == npu ]]; then
    .venv/bin/python - scripts/requirements-npu.lock >&2 << 'END' || die "see the comment at the top of scripts/requirements-npu.lock; verl's images for Ascend have these versions, and verl's scripts/install_vllm_mcore_npu.sh installs them"
import importlib.metadata, sys
missing = 0
for line in open(sys.argv[1]):
    name, _, version = line.partition("#")[0].strip().partition("==")
    try:
        found = name and importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found != version:
        missing += 1
        print(f"setup: {name} {version} is needed, but {sys.executable} has: {found}. Set PYTHON to one that has it")
sys.exit(missing > 0)
END
    # pip instead of uv, which does not see the system's packages. Not [dev], because triton would overwrite triton-ascend.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[npu]" "pytest>=8" "pytest-timeout>=2.3"
else
    uv install -e ".[$profile,dev]" --constraints scripts/requirements-cuda.lock
fi
uv install --no-deps -e .
# Compiles the MXFP4 kernels for this CPU. Without a compiler, plain PyTorch computes the same bits.
.venv/bin/python -c 'from verl_aqn.mxfp4.kernels import native; print("setup: MXFP4 kernels:", native.status().detail)' >&2
.venv/bin/python -c 'import torch; print(f"setup: torch {torch.__version__}", flush=True)' >&2
echo "$want" > "$stamp"
