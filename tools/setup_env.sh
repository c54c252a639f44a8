#!/usr/bin/env bash
# Make (or reuse) the environment of this clone, and print the path of its Python.
#
#   python="$(bash tools/setup_env.sh)"            .venv           torch 2.11 and the onedl forks
#   python="$(bash tools/setup_env.sh upstream)"   .venv-upstream  torch 2.4.1 and upstream mm*
#
# PYTHON=/path/to/python chooses the interpreter, otherwise one is looked for. Everything but the
# last line goes to standard error. A second call takes no time: a stamp remembers the requirements.
set -euo pipefail

stack="${1:-default}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

say() { printf '[setup] %s\n' "$*" >&2; }
fail() {
    printf '[setup] ERROR: %s\n' "$*" >&2
    exit 1
}

case "$stack" in
default)
    venv="$root/.venv"
    versions="3.11 3.12 3.10"
    # Pinned together: a torchvision for another torch does not import.
    packages=("torch==2.11.0" "torchvision==0.26.0" -e ".[mminstall,tests]")
    ;;
upstream)
    venv="$root/.venv-upstream"
    versions="3.10 3.11" # what mmcv 2.1.0 and mmengine 0.10.7 were made for
    packages=(-r requirements/upstream.txt -e ".[tests]")
    ;;
*) fail "unknown stack '$stack'; use 'default' or 'upstream'." ;;
esac

# ---------------------------------------------------------------- reuse
if [[ -x "$venv/bin/python" ]]; then python="$venv/bin/python"; else python="$venv/Scripts/python.exe"; fi
fingerprint() {
    {
        echo "$stack $root"
        cat requirements/*.txt setup.cfg setup.py pyproject.toml tools/setup_env.sh
    } | cksum
}
stamp="$venv/mmhybrid-stamp"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$(fingerprint)" ]] && "$python" -c '' 2>/dev/null; then
    say "using $venv"
    echo "$python"
    exit 0
fi

# ---------------------------------------------------------------- find an interpreter
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

candidates_for() { # newest patch release first
    echo "python$1"
    echo python3
    echo python
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python 2>/dev/null | sort -rV || true
    if command -v uv >/dev/null; then uv python find "$1" 2>/dev/null || true; fi
}

interpreter=""
without_venv=""
if [[ -n "${PYTHON:-}" ]]; then
    found="$(version_of "$PYTHON")"
    [[ -n "$found" ]] || fail "PYTHON=$PYTHON does not run. Set it to a Python ${versions// / or }."
    [[ " $versions " == *" $found "* ]] ||
        fail "PYTHON=$PYTHON is Python $found; the $stack stack needs Python ${versions// / or }."
    interpreter="$PYTHON"
else
    for version in $versions; do
        while read -r candidate; do
            [[ "$(version_of "$candidate")" == "$version" ]] || continue
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                interpreter="$candidate"
                break 2
            fi
            without_venv="$candidate"
        done < <(candidates_for "$version")
    done
fi
if [[ -z "$interpreter" && -n "$without_venv" ]]; then
    fail "$without_venv cannot make virtual environments (no venv and ensurepip modules). On" \
        "Debian and Ubuntu: sudo apt install python$(version_of "$without_venv")-venv. Then run" \
        "this command again."
elif [[ -z "$interpreter" ]]; then
    fail "no Python ${versions// / or } found. Install one (for example with your package" \
        "manager, pyenv or uv), or set PYTHON=/path/to/python, and run this command again."
fi

# ---------------------------------------------------------------- create and install
if [[ "$(version_of "$python")" != "$(version_of "$interpreter")" ]]; then
    say "creating $venv with Python $(version_of "$interpreter") ($interpreter)"
    rm -rf "$venv"
    "$interpreter" -m venv "$venv" >&2 ||
        fail "$interpreter could not create $venv (see above). Is the disk full?"
    if [[ -x "$venv/bin/python" ]]; then python="$venv/bin/python"; else python="$venv/Scripts/python.exe"; fi
else
    say "the requirements have changed, updating $venv"
fi

log="$venv/install.log"
say "installing ${packages[*]}"
say "PyTorch and what it needs can be several gigabytes; details in $log"
started=$SECONDS
# Without byte-compiling, which takes minutes for all of torch: importing does it for what is used.
if ! "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    --no-compile "${packages[@]}" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "pip could not install the requirements (the end of $log is above). Is there a network" \
        "connection, or is a package mirror configured ('$python -m pip config list')? Run this" \
        "command again when it is; what has been downloaded is kept."
fi

# opencv-python wants libGL, which servers lack; the headless build has the same Python modules.
if ! "$python" -c 'import cv2' >>"$log" 2>&1; then
    version="$("$python" -c \
        'from importlib.metadata import version; print(version("opencv-python"))')"
    say "opencv-python does not load here, installing opencv-python-headless $version over it"
    "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-deps \
        --force-reinstall "opencv-python-headless==$version" >>"$log" 2>&1 ||
        fail "opencv could not be installed; see the end of $log."
    "$python" -c 'import cv2' >&2 || fail "opencv does not load (see above)."
fi
say "installed in $((SECONDS - started)) s"

say "checking the environment"
if ! "$python" -m mmhybrid doctor >"$venv/doctor.log" 2>&1; then
    cat "$venv/doctor.log" >&2
    fail "the environment was installed but training would not work; see the table above."
fi
fingerprint >"$stamp"
say "ready: $venv (mmhybrid doctor is satisfied; its table is in $venv/doctor.log)"
echo "$python"
