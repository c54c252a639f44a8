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
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    export MMHYBRID_TEST_DEVICE=cuda
    code=0
    # gpu_pytest NAMES MARKS WORKERS DIST ARGUMENTS...: what the files of these names have for a GPU
    gpu_pytest() {
        local names="$1" marks="$2" workers=(-n "$3" --dist "$4") files=() file found=0
        shift 4
        [[ " $missing " != *" xdist "* ]] || workers=()
        while IFS= read -r file; do files+=("$file"); done < <(
            grep -rl --include="$names" 'mark\.gpu' tests | LC_ALL=C sort)
        ((${#files[@]})) || return 0
        "$python" -m pytest -m "$marks" -rs --durations 15 ${workers[@]+"${workers[@]}"} \
            "${files[@]}" "$@" || found=$?
        ((found == 0 || found == 5)) || code=$found  # 5: -k has selected none of these
    }
    # Cases of the kernels make their tensors on the GPU, so they have processes of their own. Most
    # of their time goes into compiling; other tests of a file share set-up and stay together.
    gpu_pytest '*_cases.py' 'gpu and not slow' 10 load ${arguments[@]+"${arguments[@]}"}
    gpu_pytest 'test_*.py' gpu 4 loadfile ${arguments[@]+"${arguments[@]}"}
    exit "$code"
fi

echo "[tests] ruff" >&2
"$python" -m ruff check .
echo "[tests] codespell" >&2
"$python" -m codespell_lib .
echo "[tests] mypy" >&2
"$python" -m mypy
echo "[tests] pytest ($stack stack)" >&2
# Two processes of one thread each; a file stays in one process, because its tests share set-up.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# tests/conftest.py orders the files by time; xdist would start with those of many tests.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 \
    ${arguments[@]+"${arguments[@]}"}
