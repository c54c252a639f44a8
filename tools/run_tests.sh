#!/usr/bin/env bash
# Pass the tests: make the environment, run the linters and the suite.
#
#   bash tools/run_tests.sh [--stack default|upstream] [arguments for pytest]
#
# For example: bash tools/run_tests.sh tests/test_ops -k scan
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=default
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
    -h | --help)
        sed -n '2,6s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done

python="$(bash tools/setup_env.sh "$stack")"

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
