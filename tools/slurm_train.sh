#!/usr/bin/env bash
# Train under slurm, one task per GPU:
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS="..."] \
#       bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]
# GPUS_PER_NODE=0 with GPUS=N runs N processes on CPUs.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options]" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
source "$(dirname "${BASH_SOURCE[0]}")/slurm_launch.sh"
launch "$partition" "$job" train.py "$config" --work-dir "$work_dir" --launcher slurm "$@"
