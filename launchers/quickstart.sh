#!/usr/bin/env bash
# From a bare machine to a trained, evaluated and exported ManagerTower on a synthetic world.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
usage: bash launchers/quickstart.sh [--long] [--seed N] [--out DIR] [--set KEY=VALUE ...]

Installs the package, draws a synthetic data set, converts it to shards, pre-trains ManagerTower with the
deepspeed launcher (2 processes on a CPU, else one per GPU), evaluates on held-out pictures, exports, and fills
masked words. Under 8 minutes on 2 free cores, installation included; a second run reuses what exists.

  --long           train longer: better figures, at most 40 minutes on 2 cores
  --seed N         seed of the training (default: 0)
  --out DIR        where everything goes (default: quickstart)
  --set KEY=VALUE  further settings of the run, such as model.link.kind=bridge_add for BridgeTower
  --help           this text
TEXT
}

out=quickstart
seed=0
long=false
settings=()
while [ $# -gt 0 ]; do
    case $1 in
        --long) long=true ;;
        --seed | --out)
            [ $# -ge 2 ] || fail "$1 without a value" "see bash launchers/quickstart.sh --help"
            if [ "$1" = --seed ]; then seed=$2; else out=$(realpath -m -- "$2"); fi
            shift
            ;;
        --set)
            [ $# -ge 2 ] || fail "--set without KEY=VALUE" "see bash launchers/quickstart.sh --help"
            while [ $# -ge 2 ] && [[ $2 == *=* ]]; do
                settings+=("$2")
                shift
            done
            ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown argument '$1'" "see bash launchers/quickstart.sh --help" ;;
    esac
    shift
done
[[ $seed =~ ^[0-9]+$ ]] || fail "--seed '$seed'" "give a whole number"

setup_environment
mkdir -p "$out"
out=$(cd "$out" && pwd)
name=$([ "$long" = true ] && echo long || echo short)-seed$seed
if [ ${#settings[@]} -gt 0 ]; then
    # Other settings are another run: they must not continue this one's checkpoints.
    name=$name-$(printf '%s\n' "${settings[@]}" | cksum | cut -d ' ' -f 1)
fi
run=$out/run-$name
words=$out/raw/visual_words.json

# What runs: GPUs where there are any, two processes on the CPU otherwise.
processes=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
fi
# The global batch of 128 is shared out evenly: as many processes as divide it.
while ((128 % processes)); do processes=$((processes - 1)); done
# Nothing here needs the network any more; a forgotten download fails at once.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

draw_world() {
    # layout and number of pictures
    "$PYTHON" -m data_tools synth --out "$out/raw" --image-size 48 --seed 0 --layout "$1" --num-images "$2"
}

synthesise() {
    draw_world coco 12000
    draw_world vg 6000
    draw_world cc3m 2000
    draw_world sbu 2000
}

convert() {
    local layout
    for layout in coco vg cc3m sbu; do
        "$PYTHON" -m data_tools convert "$layout" --raw "$out/raw/$layout" --out "$out/shards/$layout"
    done
}

build_tokenizer() {
    if [ -f "$out/shards/tokenizer/vocab.json" ]; then return; fi
    "$PYTHON" -m mt_deepspeed.build_tokenizer --vocab-size 1024 --out "$out/shards/tokenizer" \
        --shards "$out"/shards/{coco,vg,cc3m,sbu}
}

pretrain() {
    local port length=()
    if [ "$long" = true ]; then length=(train.max_steps=2400); fi
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "$PYTHON" -m "$LAUNCHER_MODULE" --num_gpus "$processes" --master_port "$port" \
        --module mt_deepspeed.train --preset quickstart \
        --deepspeed_config ds_configs/zero1.json \
        --set data.root="$out/shards" run_dir="$run" train.seed="$seed" \
        train.global_batch_size=128 train.micro_batch_size=$((128 / processes)) \
        ${length[@]+"${length[@]}"} ${settings[@]+"${settings[@]}"} 2>&1 |
        grep --line-buffered -v '\[launch\.py:\|\[runner\.py:'
}

evaluate() {
    # `test`: pictures that neither training nor the choice of the best checkpoint has seen.
    "$PYTHON" -m mt_deepspeed.evaluate --checkpoint "$run" --shards "$out/shards/coco" --splits test \
        --visual-words "$words" --max-samples 2000 --out "$run/evaluation.json" >/dev/null
}

again="run 'bash launchers/quickstart.sh' again: finished steps are reused"
step "drawing the synthetic data sets" "check the free disk space (200 MB) below $out; $again" synthesise
step "converting them to shards" "remove $out/raw and $out/shards if an older version made them; $again" convert
step "training a tokenizer on the captions" "remove $out/shards/tokenizer; $again" build_tokenizer
step "pre-training ManagerTower (progress every 25 steps)" \
    "read the error above; a run that was stopped continues from its last checkpoint: $again" pretrain
step "evaluating on held-out pictures" "$again" evaluate
step "exporting the model" "remove $out/model-$name; $again" \
    "$PYTHON" -m mt_deepspeed.export --checkpoint "$run" --out "$out/model-$name"
step "filling masked words in held-out pictures" "$again" \
    "$PYTHON" -m mt_deepspeed.show masks --model "$out/model-$name" --shards "$out/shards/coco" --split test \
    --visual-words "$words" --out "$out/predictions.png"

echo
"$PYTHON" -m mt_deepspeed.show run --run "$run" --evaluation "$run/evaluation.json"
cat <<TEXT

picture      $out/predictions.png
model        $out/model-$name        (python: mt_deepspeed.load("$out/model-$name"))
TensorBoard  tensorboard --logdir $run/tensorboard
whole time   $SECONDS s
TEXT
