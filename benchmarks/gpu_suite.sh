#!/usr/bin/env bash
# Everything about the kernels that needs a GPU, in one go of about ten minutes: build, tests, sanitizer, benchmark,
# profile. Each step writes a file to the output folder and is not repeated when that says it is done, so that a
# cut-off run goes on where it was.
#
#   bash benchmarks/gpu_suite.sh [OUTPUT_FOLDER]        # default: benchmarks/results/gpu
#
# Needs torch, nvcc (for the CUDA kernels) and, for the tests, pytest, pytest-timeout and hypothesis. Where these
# cannot be installed: pip install --target .gpu_packages pytest pytest-timeout hypothesis, elsewhere, and bring
# the folder along. DeepSpeed, open_clip and torchdata are not needed.
set -uo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2

output=${1:-benchmarks/results/gpu}
mkdir -p "$output"
output=$(cd "$output" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d .gpu_packages ]; then export PYTHONPATH="$PYTHONPATH:$PWD/.gpu_packages"; fi
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-/tmp/mt_deepspeed_cache}"
failed=()

# step NAME SECONDS COMMAND...: runs once; the last line of its file says how it ended.
step() {
    local name=$1 seconds=$2 file="$output/$1.txt" status
    shift 2
    if [ -f "$file" ] && [ "$(tail -n 1 "$file")" = "== done" ]; then
        echo "$name: done before"
        return
    fi
    echo "$name ..."
    SECONDS=0
    timeout "$seconds" "$@" >"$file" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        echo "== done" >>"$file"
        echo "$name: done, $SECONDS s"
    else
        echo "== failed with status $status after $SECONDS s" >>"$file"
        echo "$name: FAILED ($status) after $SECONDS s, see $file" >&2
        failed+=("$name")
    fi
}

about() {
    date -u
    git rev-parse HEAD 2>/dev/null || echo "commit ${MT_COMMIT:-unknown}"
    nvidia-smi
    nvcc --version || /usr/local/cuda/bin/nvcc --version || echo "no nvcc"
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
}
export -f about
export python

build="from mt_deepspeed.kernels.manager_aggregation import build; print(build.library())"
tests=(-m pytest -q -p no:cacheprovider tests/gpu)

step about 60 bash -c about
step registers 200 "$python" -m mt_deepspeed.kernels.manager_aggregation.build --output /tmp/registers.so --arch 90
step build 200 "$python" -c "$build"
step tests 200 "$python" "${tests[@]}" -k "not sanitizer"
step benchmark 240 "$python" -m benchmarks.manager_aggregation --seconds 0.1 --rounds 2 \
    --results "$output/manager_aggregation.csv"
step benchmark_fp32 60 "$python" -m benchmarks.manager_aggregation --seconds 0.1 --rounds 2 --dtype float32 \
    --shapes 64,325,768 --results "$output/manager_aggregation.csv"
step profile 90 "$python" -m benchmarks.manager_aggregation --ways eager triton cuda --profile "$output/kernels.txt"
step sanitizer 300 "$python" "${tests[@]}" -k sanitizer

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "all figures are in $output"
