#!/usr/bin/env bash
# Train in several processes, one per GPU (or on the CPU, where there is no GPU):
#   bash tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]
# On several machines start it on each, with the same MASTER_ADDR and PORT:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 bash tools/dist_train.sh CONFIG 8
# MAX_RESTARTS=3 in front lets all processes start again from the newest checkpoint when one is lost.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]" >&2
    exit 2
fi
config=$1 processes=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh"
launch "$processes" train.py "$config" --launcher pytorch "$@"
