#!/usr/bin/env bash
# Make the documentation's site in build/site from README.md, docs/ and the pages beside the code.
#
#   bash tools/build_docs.sh [options for mkdocs build]
#
# A warning, such as a link that leads nowhere, is an error. The generator is installed into .venv-docs;
# with PYTHON=... that Python is used as it is.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    [[ -x .venv-docs/bin/python ]] || python3 -m venv .venv-docs
    python=.venv-docs/bin/python
    "$python" -m pip install -q -r requirements/docs.txt
fi

# Pages keep their places, so that a link is the same in the repository and on the site.
rm -rf build/docs
mkdir -p build/docs
find README.md LICENSE docs examples configs tools mmhybrid -type d -name .mim -prune -o -type f \
    \( -name '*.md' -o -name LICENSE -o -path 'docs/images/*' -o -path 'examples/*.py' \
    -o -path 'tools/benchmark/results/*' \) -print0 |
    tar --null -cf - -T - | tar -xf - -C build/docs
"$python" -m mkdocs build --strict "$@"
