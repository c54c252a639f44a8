#!/usr/bin/env bash
# Evaluate in several processes, one per GPU (or on the CPU, where there is no GPU):
#   bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of tools/test.py]
# NNODES, NODE_RANK, MASTER_ADDR and PORT as for tools/dist_train.sh.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of tools/test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 processes=$3
shift 3
source "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh"
launch "$processes" test.py "$config" "$checkpoint" --launcher pytorch "$@"
