#!/usr/bin/env bash
# Shared by the scripts of this folder: `source` it, then call `setup_environment`.
# It finds Python, makes and enters a virtual environment, and installs this package into it once.

REPO_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export REPO_ROOT

# say TEXT: one line of progress.
say() { printf '==> %s\n' "$*"; }

# fail WHAT FIX: name the step that failed and what to do about it, then stop.
fail() {
    printf '\nFAILED: %s\n' "$1" >&2
    if [ -n "${2:-}" ]; then printf 'What to do: %s\n' "$2" >&2; fi
    exit 1
}

# step NAME FIX COMMAND...: run a command under a name; if it fails, say which step it was and what to do.
step() {
    local name=$1 fix=$2 started=$SECONDS status=0
    shift 2
    say "$name"
    # Not `"$@" || status=$?`: bash would then go on after a failed command inside a function.
    set +e
    (
        set -e
        "$@"
    )
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then fail "$name (exit status $status)" "$fix"; fi
    say "$name: done in $((SECONDS - started)) s"
}

# require_python: set PYTHON to the first interpreter on PATH that is new enough.
require_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            PYTHON=$(command -v "$candidate")
            return
        fi
    done
    fail "no Python 3.10 or newer on PATH" \
        "install one (for example 'apt-get install python3 python3-venv') or set PYTHON=/path/to/python"
}

# enter_environment: stay in an active virtual environment (VIRTUAL_ENV or CONDA_PREFIX), else use REPO_ROOT/.venv.
enter_environment() {
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [ -z "$active" ]; then
        active=$REPO_ROOT/.venv
        if [ ! -x "$active/bin/python" ] || ! "$active/bin/python" -m pip --version >/dev/null 2>&1; then
            require_python
            step "making a virtual environment in .venv" \
                "install Python's venv module (Debian: apt-get install python3-venv), remove .venv, run this again" \
                "$PYTHON" -m venv "$active"
        fi
        export VIRTUAL_ENV=$active
    fi
    # DeepSpeed and torch look for `ninja` on PATH, so the folder must be there and not only its python.
    export PATH=$active/bin:$PATH
    PYTHON=$active/bin/python
    export PYTHON ENVIRONMENT=$active
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "the environment $active has no Python 3.10 or newer" "deactivate it, or remove it and run this again"
}

# pip_install TARGET: install in editable mode; in a log, one short line per package instead of pip's progress bars.
pip_install() {
    local pip=("$PYTHON" -m pip install --disable-pip-version-check --no-input)
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip --default-pip
    if [ -t 1 ]; then
        "${pip[@]}" -e "$1"
        return
    fi
    (
        set -o pipefail
        "${pip[@]}" --progress-bar off -e "$1" | sed -u -n -E \
            -e 's/^Collecting ([^ ]+).*/    \1/p' -e 's/^Installing collected.*/    unpacking them (a minute or two)/p'
    )
}

# require_space FOLDER GB: stop before an installation that would fill the folder's disk.
require_space() {
    local free
    free=$(df -Pk "$1" | awk 'NR == 2 { print int($4 * 1024 / 10 ^ 9) }')
    if [ "$free" -lt "$2" ]; then
        fail "installing torch needs $2 GB of disk space in $1, $free GB are free" "make room there, or choose another \
disk: TMPDIR for what pip unpacks, an active environment for the packages (one that holds torch needs no room)"
    fi
}

# require_space_for_torch: 7 GB stay in the environment, 3 GB pass through pip's temporary folder.
require_space_for_torch() {
    local temporary=${TMPDIR:-/tmp}
    if "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then return; fi
    if [ "$(stat -c %d "$temporary")" = "$(stat -c %d "$ENVIRONMENT")" ]; then
        require_space "$ENVIRONMENT" 10
    else
        require_space "$temporary" 3
        require_space "$ENVIRONMENT" 7
    fi
}

# install_package [EXTRA]: `pip install -e` this folder, unless that was done for the present setup.py and pyproject.toml.
install_package() {
    local extra=${1:-} stamp key target=$REPO_ROOT
    stamp=$ENVIRONMENT/.mt_deepspeed_installed${extra:+_$extra}
    key=$({ printf '%s\n' "$REPO_ROOT"; cat "$REPO_ROOT/setup.py" "$REPO_ROOT/pyproject.toml"; } | cksum)
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
        say "the package is installed in $ENVIRONMENT"
        return
    fi
    require_space_for_torch
    if [ -n "$extra" ]; then target="${REPO_ROOT}[$extra]"; fi
    step "installing the package and what it needs into $ENVIRONMENT (torch included: some minutes the first time)" \
        "read pip's message above; check the network, pip's index settings and the free disk space" \
        pip_install "$target"
    printf '%s\n' "$key" >"$stamp"
}

# setup_environment [EXTRA]: everything above, from the repository's root.
setup_environment() {
    cd "$REPO_ROOT" || fail "cannot enter $REPO_ROOT" "check the folder's permissions"
    enter_environment
    install_package "${1:-}"
}

# require_package: for launchers that run on many nodes, where installing at start would race.
require_package() {
    "$PYTHON" -c 'import deepspeed, mt_deepspeed' 2>/dev/null || fail \
        "$PYTHON cannot import mt_deepspeed and deepspeed" \
        "run 'bash launchers/test.sh --setup-only' once, on a machine that sees this folder"
}

# The deepspeed launcher, started as a module: the first line of its script breaks where the path holds a space.
LAUNCHER_MODULE=deepspeed.launcher.runner
export LAUNCHER_MODULE

# run_or_show COMMAND...: run it, or only print it after --dry-run.
run_or_show() {
    if [ "${DRY_RUN:-false}" = true ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    exec "$@"
}
