#!/usr/bin/env bash
# Makes this machine a node of a Ray cluster, with token authentication. Set it up first: bash scripts/setup.sh
#   bash scripts/ray_start.sh head [--address IP] [--port N]       without an address: for this machine only
#   bash scripts/ray_start.sh worker HEAD_IP:PORT [--address IP]   needs the head's token, whose path the head prints
#   --profile cpu|cuda|npu, --devices N; anything else goes to `ray start`. To stop a node: .venv/bin/ray stop
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"  # in a container, verl-aqn is on the PATH already
exec verl-aqn node "$@"
