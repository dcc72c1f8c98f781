#!/usr/bin/env bash
# Trains on this machine: one process per GPU, or a chosen number of processes.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
usage: bash launchers/local.sh [--processes N] [--dry-run] TRAINING ARGUMENTS ...

  --processes N  processes to start; default: the number of GPUs, or 1 where there is none
  --dry-run      print the command, run nothing
  --help         this text

Everything else goes to mt_deepspeed.train, paths relative to the repository's root:
  bash launchers/local.sh --preset managertower-base --deepspeed_config ds_configs/zero1.json \
      --set data.root=/data/shards train.max_steps=1000
TEXT
}

processes=""
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --processes)
            processes=${2:-}
            [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes '$processes'" "give a number, such as --processes 2"
            shift
            ;;
        --dry-run) export DRY_RUN=true ;;
        -h | --help) usage; exit 0 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

setup_environment
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ -z "$processes" ]; then processes=$((gpus > 0 ? gpus : 1)); fi
if [ "$gpus" -gt 0 ] && [ "$processes" -gt "$gpus" ]; then
    fail "--processes $processes, but this machine has $gpus GPUs" "ask for at most $gpus"
fi
if [ "$gpus" -eq 0 ]; then
    export DS_ACCELERATOR=cpu
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
fi
# A free port, so that two runs can share the machine.
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
run_or_show "$PYTHON" -m "$LAUNCHER_MODULE" --num_gpus "$processes" --master_port "$port" \
    --module mt_deepspeed.train ${arguments[@]+"${arguments[@]}"}
