#!/usr/bin/env bash
# Sets up the environment and runs the test suite.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
usage: bash launchers/test.sh [--fast | --all | --gpu] [--setup-only] [pytest arguments ...]

  --fast        what runs on a CPU in minutes (the default): no slow, gpu or soak tests
  --all         everything this machine can run: slow tests too, gpu tests where there is a GPU
  --gpu         only the tests that need a GPU
  --setup-only  make the environment, install the package, run nothing
  --help        this text

Whatever else is given goes to pytest:  bash launchers/test.sh tests/unit/data -k order -x
TEXT
}

selection="not slow and not gpu and not soak"
run_tests=true
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --fast) selection="not slow and not gpu and not soak" ;;
        --all) selection="" ;;
        --gpu) selection="gpu" ;;
        --setup-only) run_tests=false ;;
        -h | --help) usage; exit 0 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

setup_environment dev
if [ "$run_tests" = false ]; then exit 0; fi

# Tests start several processes; one thread each keeps them from fighting over the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# No test needs a download: a forgotten one fails at once instead of waiting for the network.
export HF_HUB_OFFLINE=1
say "pytest${selection:+ -m \"$selection\"} ${arguments[*]+${arguments[*]}}"
exec "$PYTHON" -m pytest ${selection:+-m "$selection"} ${arguments[@]+"${arguments[@]}"}
