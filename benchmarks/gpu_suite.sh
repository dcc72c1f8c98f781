#!/usr/bin/env bash
# Everything that needs a GPU, most valuable first: the kernels (tests, benchmark, profile, sanitizer), the whole step
# (against the published way and transformers, with each backend, profile, planned memory) and retrieval.
#
#   bash benchmarks/gpu_suite.sh [OUTPUT_FOLDER [STEP...]]     # default: benchmarks/results/gpu, all steps
#   DRY=1 bash benchmarks/gpu_suite.sh                         # prints what would run
#
# Where a job may take only so long, BUDGET=SECONDS ends the suite in time (default: no limit) and names the steps that
# it did not get done: ask for them in another run (about, packages and build are part of every one). Each step has a
# limit of its own; a failed one stops no other.
# All output goes to log.txt as it comes, figures to csv files beside it; with the same folder, steps that are done
# are not repeated. MT_COMMIT names the commit where there is no git.
#
# Needs torch, nvcc, pytest, pytest-timeout and hypothesis; pytest-xdist makes tests faster. Step and retrieval need
# the package's other requirements too. Wheels in .gpu_wheels are installed first, for machines without network.
#
# `curves` is left out unless SHARDS names the shards of launchers/quickstart.sh. `benchmarks.growth` is not here: it
# measures processor time.
set -uo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2

output=${1:-benchmarks/results/gpu}
mkdir -p "$output"
output=$(cd "$output" && pwd)
shift $(($# > 0 ? 1 : 0))
wanted=("$@")
log=$output/log.txt
budget=${BUDGET:-1000000}
failed=() not_reached=() lacking=
SECONDS=0

export python=${PYTHON:-python3} site=/tmp/mt_deepspeed_site
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-/tmp/mt_deepspeed_cache}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRITON_INTERPRET=0

# asked NAME: whether this run is to do the step.
asked() {
    case $1 in about | packages | build) return 0 ;; esac
    if [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $1 "* ]]; then return 1; fi
    if grep -qs "^== $1: done" "$log"; then
        echo "$1: done before"
        return 1
    fi
}

# step NAME SECONDS COMMAND...: runs it, unless it is done or no time is left. Interrupted as by Ctrl-C: pytest then
# still prints what failed, and Python where it was.
step() {
    local name=$1 limit=$2 left=$((budget - SECONDS)) start=$SECONDS status
    shift 2
    if ! asked "$name"; then return; fi
    if [ -n "${DRY:-}" ]; then
        echo "$name, at most $limit s: $*"
        return
    fi
    if [ "$left" -lt 15 ]; then
        not_reached+=("$name")
        return
    fi
    echo "$name ..."
    echo "== $name: $*" >>"$log"
    timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@" >>"$log" 2>&1 </dev/null
    status=$?
    if [ $status -eq 0 ]; then
        echo "== $name: done, $((SECONDS - start)) s" | tee -a "$log"
    elif [[ $status =~ ^(124|137)$ ]] && [ "$left" -lt "$limit" ]; then
        echo "== $name: cut off after $left s" | tee -a "$log"
        not_reached+=("$name")
    else
        echo "== $name: FAILED with status $status after $((SECONDS - start)) s (124, 137: too slow)" | tee -a "$log"
        failed+=("$name")
    fi
    return $status
}

# whole NAME SECONDS COMMAND...: a step that needs what `packages` brings.
whole() {
    if [ -z "$lacking" ]; then
        step "$@"
    elif asked "$1"; then
        echo "== $1: left out, $lacking" | tee -a "$log"
    fi
}

about() {
    date -u
    git rev-parse HEAD 2>/dev/null || echo "commit ${MT_COMMIT:-unknown}"
    nvidia-smi
    nvcc --version || /usr/local/cuda/bin/nvcc --version || echo "no nvcc"
    "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())'
}

packages() {
    if compgen -G ".gpu_wheels/*.whl" >/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
            .gpu_wheels/*.whl || return
    fi
    "$python" -c "import deepspeed, open_clip, torchdata.nodes"
}
export -f about packages

build="from mt_deepspeed.kernels.manager_aggregation import build; print(build.library())"
kernels=("$python" -m benchmarks.manager_aggregation --seconds 0.1 --rounds 2
    --save "$output/manager_aggregation.csv")
tests=("$python" -m pytest -v --tb=short -p no:cacheprovider)
if "$python" -c "import xdist" 2>/dev/null; then tests+=(-n 8); fi
train_step=("$python" -m benchmarks.train_step --rounds 5 --save "$output/train_step.csv" --precision)
profile_step=("$python" -m benchmarks.profile_step --set train.micro_batch_size=32 train.global_batch_size=32)

step about 60 bash -c about
step packages 120 bash -c packages || lacking="packages are missing (see $log)"
step build 150 "$python" -c "$build"
step tests 200 "${tests[@]}" tests/gpu/test_manager_aggregation.py -k "not sanitizer"
step benchmark 150 "${kernels[@]}" --shapes 6,64,325,768
whole step_base 220 "${train_step[@]}" bf16 --micro-batch 32
whole step_cuda 90 env MT_KERNELS=cuda "${train_step[@]}" bf16 --systems ours --micro-batch 32
whole retrieval 120 "$python" -m benchmarks.retrieval --sizes base --precisions bf16 --items 16 500 --chunks 500 250 \
    --rounds 2 --save "$output/retrieval.csv"
step profile 60 "${kernels[@]}" --ways eager triton cuda --profile "$output/kernels.txt"
whole step_profile 90 "${profile_step[@]}" --top 40

step benchmark_shapes 200 "${kernels[@]}" --shapes 6,64,50,768 6,64,442,1024 6,256,325,768
step benchmark_sizes 200 "${kernels[@]}" --ways eager reference triton cuda
step sanitizer 300 "${tests[@]}" tests/gpu/test_manager_aggregation.py -k sanitizer
whole plan_memory 300 "${tests[@]}" tests/gpu/test_plan_memory.py
whole step_small 120 "${train_step[@]}" bf16 --micro-batch 8
whole step_fp32 120 "${train_step[@]}" fp32 --micro-batch 8
whole step_bridge 120 "${train_step[@]}" bf16 --systems bridge transformers --micro-batch 32
whole step_reference 90 env MT_KERNELS=reference "${train_step[@]}" bf16 --systems ours --micro-batch 32
whole step_stages 150 "${train_step[@]}" bf16 --systems ours --micro-batch 32 --stage 1 2 3
whole step_checkpointing 120 "${train_step[@]}" bf16 --systems ours --micro-batch 64 --checkpointing 0 1 2
whole step_compile 200 "${train_step[@]}" bf16 --systems ours --micro-batch 32 --set train.compile=true
whole step_long_texts 120 "${train_step[@]}" bf16 --micro-batch 32 --text-tokens 50
step benchmark_fp32 60 "${kernels[@]}" --dtype float32 --shapes 6,64,325,768
if [ -n "${SHARDS:-}" ]; then
    whole curves 200 "$python" -m benchmarks.curves --shards "$SHARDS" --backends reference triton cuda \
        --save "$output/curves.csv"
fi

if [ ${#not_reached[@]} -gt 0 ]; then echo "no time for: ${not_reached[*]}" | tee -a "$log"; fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" | tee -a "$log"
    exit 1
fi
echo "figures are in $output"
