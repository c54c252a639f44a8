# Sourced by slurm_train.sh, slurm_test.sh and slurm_search.sh.
# launch PARTITION JOB TOOL ARGUMENTS...: run a tool of this folder under srun.
launch() {
    local partition=$1 job=$2 tool=$3 tools
    tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    shift 3
    local gpus=${GPUS:-8}
    local per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
    local tasks_per_node=$((per_node > 0 ? per_node : gpus))
    local gres=()
    if [ "$per_node" -gt 0 ]; then gres=(--gres="gpu:$per_node"); fi
    # exec: a signal to the script has to reach srun.
    # shellcheck disable=SC2086  # SRUN_ARGS holds several words on purpose
    exec srun -p "$partition" --job-name="$job" "${gres[@]+"${gres[@]}"}" --ntasks="$gpus" \
        --ntasks-per-node="$tasks_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} "$(python_of "$tools/..")" -u "$tools/$tool" "$@"
}

# PYTHON, or the active environment's, or that of tools/setup_env.sh, or the one on PATH.
python_of() {
    if [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
    elif [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$1/.venv/bin/python" ]; then
        echo "$1/.venv/bin/python"
    else
        echo python
    fi
}
