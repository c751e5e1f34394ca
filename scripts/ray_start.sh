#!/usr/bin/env bash
# Makes this machine a node of a Ray cluster, with token authentication. Set it up first: bash scripts/setup.sh
#   bash scripts/ray_start.sh head [--address IP] [--port N]       without an address: for this machine alone
#   bash scripts/ray_start.sh worker HEAD_IP:PORT [--address IP]   needs the head's token, whose place the head prints
#   --profile cpu|cuda|npu, --devices N; anything else goes to `ray start`. To stop a node: .venv/bin/ray stop
set -euo pipefail
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"  # in a container it is on the path
exec verl-aqn node "$@"
