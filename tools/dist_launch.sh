# Sourced by dist_train.sh, dist_test.sh and dist_search.sh.
# launch PROCESSES TOOL ARGUMENTS...: run a tool of this folder under torchrun.
launch() {
    local processes=$1 tools
    tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    shift
    local nodes=${NNODES:-1} restarts=${MAX_RESTARTS:-0} where
    if [ "$nodes" = 1 ] && [ -z "${PORT:-}" ]; then
        where=(--standalone)  # picks a free port
    elif [ "$restarts" != 0 ]; then  # machines that start again have to meet again
        where=(--nnodes="$nodes" --rdzv_backend=c10d --rdzv_id="${JOB_ID:-mmhybrid}"
               --rdzv_endpoint="${MASTER_ADDR:-127.0.0.1}:${PORT:-29500}")
    else
        where=(--nnodes="$nodes" --node_rank="${NODE_RANK:-0}"
               --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
    fi
    local tool=$1
    shift
    # One thread each is torchrun's own default; setting it here spares its warning.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # exec: a signal to the script has to reach torchrun, not a shell that waits for it.
    exec "$(python_of "$tools/..")" "$tools/dist_launch.py" \
        "${where[@]}" --max_restarts="$restarts" --nproc_per_node="$processes" "$tools/$tool" "$@"
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
