#!/usr/bin/env bash
# Everything that needs a GPU: kernels (build, tests, benchmark, profile, sanitizer) and the whole step (against the
# published way and transformers, profile, plan). Each step has a time limit, writes a file to the output folder and
# is not repeated when that says it is done: a cut-off run goes on where it was, and a failed step stops no other.
#
#   bash benchmarks/gpu_suite.sh [OUTPUT_FOLDER [STEP...]]     # default: benchmarks/results/gpu, all steps
#   DRY=1 bash benchmarks/gpu_suite.sh                         # prints what would run
#
# Ten minutes suffice for the kernels (about to profile), ten more for the step (step_base to curves).
#
# Needs torch and nvcc (for the CUDA kernels); the tests pytest, pytest-timeout and hypothesis; the step transformers,
# DeepSpeed and open_clip. What cannot be installed comes along as wheels in .gpu_wheels:
#   pip wheel --no-deps --wheel-dir .gpu_wheels hypothesis deepspeed hjson msgpack open_clip_torch timm ftfy wcwidth
# `curves` is left out unless SHARDS names the shards of launchers/quickstart.sh.
set -uo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2

output=${1:-benchmarks/results/gpu}
mkdir -p "$output"
output=$(cd "$output" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export DS_BUILD_OPS=0
shift $(($# > 0 ? 1 : 0))
wanted=("$@")
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-/tmp/mt_deepspeed_cache}"
failed=()

# step NAME SECONDS COMMAND...: runs once; the last line of its file says how it ended.
step() {
    local name=$1 seconds=$2 file="$output/$1.txt" status
    shift 2
    if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    if [ -n "${DRY:-}" ]; then
        echo "$name, at most $seconds s: $*"
        return
    fi
    if [ -f "$file" ] && [ "$(tail -n 1 "$file")" = "== done" ]; then
        echo "$name: done before"
        return
    fi
    echo "$name ..."
    SECONDS=0
    timeout --kill-after=10 "$seconds" "$@" >"$file" 2>&1
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

packages() {
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .gpu_wheels/*.whl
}
export -f packages
export site=/tmp/mt_deepspeed_site
export PYTHONPATH="$PYTHONPATH:$site"
train_step=("$python" -m benchmarks.train_step --rounds 5 --results "$output/train_step.csv")
profile_step=("$python" -m benchmarks.profile_step --set train.micro_batch_size=32 train.global_batch_size=32)

build="from mt_deepspeed.kernels.manager_aggregation import build; print(build.library())"
tests=(-m pytest -q -p no:cacheprovider tests/gpu)

step about 60 bash -c about
if compgen -G ".gpu_wheels/*.whl" >/dev/null; then step packages 120 bash -c packages; fi
step registers 200 "$python" -m mt_deepspeed.kernels.manager_aggregation.build --output /tmp/registers.so --arch 90
step build 200 "$python" -c "$build"
step tests 200 "$python" "${tests[@]}" -k "not sanitizer"
step benchmark 240 "$python" -m benchmarks.manager_aggregation --seconds 0.1 --rounds 2 \
    --results "$output/manager_aggregation.csv"
step benchmark_fp32 60 "$python" -m benchmarks.manager_aggregation --seconds 0.1 --rounds 2 --dtype float32 \
    --shapes 6,64,325,768 --results "$output/manager_aggregation.csv"
step profile 90 "$python" -m benchmarks.manager_aggregation --ways eager triton cuda --profile "$output/kernels.txt"

step step_base 150 "${train_step[@]}" --micro-batch 8 32 --precision bf16
step step_profile 90 "${profile_step[@]}" --top 40
step step_fp32 90 "${train_step[@]}" --micro-batch 8 --precision fp32
step step_bridge 90 "${train_step[@]}" --systems bridge transformers --micro-batch 8 32 --precision bf16
step step_long_texts 90 "${train_step[@]}" --micro-batch 32 --precision bf16 --text-tokens 50
step step_stages 120 "${train_step[@]}" --systems ours --micro-batch 32 --precision bf16 --stage 1 2 3
step step_checkpointing 90 "${train_step[@]}" --systems ours --micro-batch 64 --precision bf16 --checkpointing 0 1 2
step step_compile 150 "${train_step[@]}" --systems ours --micro-batch 32 --precision bf16 --set train.compile=true
if [ -n "${SHARDS:-}" ]; then
    step curves 150 "$python" -m benchmarks.curves --shards "$SHARDS" --backends reference triton cuda \
        --results "$output/curves.csv" --picture "$output/curves.png"
fi
step sanitizer 300 "$python" "${tests[@]}" -k sanitizer

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
echo "all figures are in $output"
