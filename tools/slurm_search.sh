#!/usr/bin/env bash
# Search scan directions under slurm, one task per GPU; variables as for slurm_train.sh:
#   bash tools/slurm_search.sh PARTITION JOB_NAME CONFIG WORK_DIR \
#       [options of tools/search_directions.py]
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: bash tools/slurm_search.sh PARTITION JOB_NAME CONFIG WORK_DIR [options]" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
source "$(dirname "${BASH_SOURCE[0]}")/slurm_launch.sh"
launch "$partition" "$job" search_directions.py "$config" --work-dir "$work_dir" \
    --launcher slurm "$@"
