#!/usr/bin/env bash
# Pass the tests: make the environment, run the linters and the suite.
#
#   bash tools/run_tests.sh [--stack default|upstream] [arguments for pytest]
#   bash tools/run_tests.sh --gpu [arguments for pytest]
#
# For example: bash tools/run_tests.sh tests/test_ops -k scan
# --gpu runs what a GPU adds, and no linters. With PYTHON=/path/to/python it takes that environment
# as it is, without installing anything: what is missing there is named, and its tests do not run.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=default
gpu=""
arguments=()
while (($#)); do
    case "$1" in
    --stack)
        (($# > 1)) || { echo "--stack needs a value: default or upstream." >&2 && exit 2; }
        stack="$2"
        shift 2
        ;;
    --stack=*)
        stack="${1#--stack=}"
        shift
        ;;
    --gpu)
        gpu=yes
        shift
        ;;
    -h | --help)
        sed -n '2,9s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done

fail() {
    printf '[tests] ERROR: %s\n' "$*" >&2
    exit 1
}

if [[ -n "$gpu" && -n "${PYTHON:-}" ]]; then
    python="$PYTHON"
else
    python="$(bash tools/setup_env.sh "$stack")"
fi

if [[ -n "$gpu" ]]; then
    "$python" -c 'import torch' ||
        fail "PYTHON=$python cannot import torch (see above); name an environment that has it."
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
        fail "PyTorch sees no GPU; run this on a machine with one, or leave out --gpu."
    "$python" -c 'import pytest' ||
        fail "PYTHON=$python has no pytest; install it there, or unset PYTHON."
    missing="$("$python" -c '
from importlib.util import find_spec
names = "triton mmengine mmcv mmdet mmseg xdist".split()
print(*(name for name in names if find_spec(name) is None))')"
    [[ -z "$missing" ]] ||
        echo "[tests] not installed: $missing. What needs it does not run; reasons come last." >&2
    workers=()
    # Most of the time goes into compiling kernels. A file stays in one process.
    [[ " $missing " == *" xdist "* ]] || workers=(-n 4 --dist loadfile)
    files=()
    while IFS= read -r file; do files+=("$file"); done < <(
        grep -rl --include='test_*.py' 'mark\.gpu' tests | LC_ALL=C sort)
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    export MMHYBRID_TEST_DEVICE=cuda
    exec "$python" -m pytest -m gpu -rs --durations 15 ${workers[@]+"${workers[@]}"} \
        "${files[@]}" ${arguments[@]+"${arguments[@]}"}
fi

echo "[tests] ruff" >&2
"$python" -m ruff check .
echo "[tests] codespell" >&2
"$python" -m codespell_lib .
echo "[tests] pytest ($stack stack)" >&2
# Two processes of one thread each; a file stays in one process, because its tests share set-up.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# tests/conftest.py orders the files by time; xdist would start with those of many tests.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 \
    ${arguments[@]+"${arguments[@]}"}
