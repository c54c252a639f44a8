#!/usr/bin/env bash
# Search scan directions in several processes, one per GPU (or on the CPU):
#   bash tools/dist_search.sh CONFIG PROCESSES [options of tools/search_directions.py]
# On several machines as with dist_train.sh.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash tools/dist_search.sh CONFIG PROCESSES" \
        "[options of tools/search_directions.py]" >&2
    exit 2
fi
config=$1 processes=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh"
launch "$processes" search_directions.py "$config" --launcher pytorch "$@"
