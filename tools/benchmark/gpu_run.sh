#!/usr/bin/env bash
# All that a GPU can say in a few minutes: compile, test, measure, sweep, profile, sum up.
#
#   bash tools/benchmark/gpu_run.sh MINUTES [--dry-run]
#
# OUT=folder takes the results within seconds of each row: summary.md, failures.txt and results.tar.gz.
# They are whole at any moment, should the machine be taken away. WORK=folder (default:
# work_dirs/gpu_run/DATE) is where parts write. KERNELS=archive of kernel_cache.py spares compiling.
# PYTHON=/path/to/python is used as it is; without it the environment of tools/setup_env.sh is made.
# --dry-run does everything on a CPU, interpreted and at the smallest shapes. The exit code is 0 when
# every part ran and passed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-}"
[[ -n "$python" ]] || python="$(bash "$root/tools/setup_env.sh")"
exec "$python" "$root/tools/benchmark/gpu_run.py" "$@"
