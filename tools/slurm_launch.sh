# Sourced by slurm_train.sh and slurm_test.sh.
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
    # shellcheck disable=SC2086  # SRUN_ARGS holds several words on purpose
    srun -p "$partition" --job-name="$job" "${gres[@]+"${gres[@]}"}" --ntasks="$gpus" \
        --ntasks-per-node="$tasks_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} "${PYTHON:-python}" -u "$tools/$tool" "$@"
}
