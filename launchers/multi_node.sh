#!/usr/bin/env bash
# Trains on several nodes with the deepspeed launcher: inside a SLURM allocation, or over ssh with a hostfile.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
usage: bash launchers/multi_node.sh [--hostfile FILE] [--launcher NAME] [--slots N] [--dry-run] TRAINING ARGUMENTS ...

  --hostfile FILE  lines of 'HOST slots=PROCESSES'; needs pdsh here and ssh without a password to every host.
                   Without it: the nodes of the SLURM allocation this runs in (salloc or sbatch)
  --launcher NAME  SLURM only, how the nodes are reached:
                     srun   one deepspeed launcher per node, started by srun; no ssh needed (default)
                     slurm  deepspeed's own: srun starts every rank; keeps the ranks' exit status
                     pdsh   ssh without a password to every node
  --slots N        SLURM only: processes per node; default: GPUs per node of the allocation, or 1
  --dry-run        print the command, run nothing
  --help           this text

The repository and its environment must stand at the same path on every node.
Everything else goes to mt_deepspeed.train. For batch jobs slurm/pretrain.sbatch is the simpler way.
TEXT
}

hostfile=""
launcher=srun
slots=""
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --hostfile) hostfile=${2:-}; shift ;;
        --launcher) launcher=${2:-}; shift ;;
        --slots) slots=${2:-}; shift ;;
        --dry-run) export DRY_RUN=true ;;
        -h | --help) usage; exit 0 ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

if [ -n "$hostfile" ]; then
    [ -r "$hostfile" ] || fail "--hostfile $hostfile cannot be read" "give the path of a file of lines 'HOST slots=N'"
    hostfile=$(realpath -- "$hostfile")
elif [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    fail "neither --hostfile nor a SLURM allocation" \
        "give --hostfile FILE, or run this inside 'salloc --nodes=2 --ntasks-per-node=1 --gpus-per-node=8'"
fi
case $launcher in srun | slurm | pdsh) ;; *) fail "--launcher '$launcher'" "give srun, slurm or pdsh" ;; esac

cd "$REPO_ROOT"
mkdir -p runs

# hand_on: what deepspeed is to set on the nodes that it reaches by ssh, which takes no variables along, and what the
# user's own file for this says. The values become part of command lines that other users can see: no HF_TOKEN.
hand_on() {
    local file=$REPO_ROOT/runs/variables.$$ given=${DS_ENV_FILE:-.deepspeed_env} one
    if [ "${DRY_RUN:-false}" = true ]; then return; fi
    # Where deepspeed would look for the user's file.
    local own=("${HOME:-}/$given" "$given")
    if [[ $given == /* ]]; then own=("$given"); fi
    rm -f -- "$file"
    (
        umask 077
        {
            env | grep -E '^(PATH|LD_LIBRARY_PATH|OMP_NUM_THREADS|NVME_PATH|SLURM_JOB_END_TIME|((MT|DS|HF|NCCL|GLOO|TOKENIZERS)_[A-Z0-9_]*))=' |
                grep -v -E '^(HF_TOKEN|DS_ENV_FILE)='
            for one in "${own[@]}"; do
                if [ -f "$one" ]; then awk 1 "$one"; fi
            done
        } >"$file"
    )
    # Open, but without a name: however this ends, it leaves no file.
    exec 3<"$file"
    rm -f -- "$file"
    export DS_ENV_FILE=/dev/fd/3
}

if [ -n "$hostfile" ]; then
    enter_environment
    require_package
    hand_on
    run_or_show "$PYTHON" -m "$LAUNCHER_MODULE" --hostfile "$hostfile" \
        --module mt_deepspeed.train ${arguments[@]+"${arguments[@]}"}
    exit
fi

source slurm/job.sh
export SLURM_SUBMIT_DIR=${SLURM_SUBMIT_DIR:-$REPO_ROOT}
find_python
require mt_deepspeed deepspeed
set_network
slots=${slots:-${SLURM_GPUS_ON_NODE:-1}}
hostfile=$REPO_ROOT/runs/hostfile.$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$slots/" >"$hostfile"
master=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")

case $launcher in
    srun)
        # Each launcher finds its place in the hostfile by its node's number. Ranks act on the signals they get; a
        # launcher must not die of them first, so it starts with those that it does not know of ignored.
        # shellcheck disable=SC2016  # $SLURM_NODEID differs per node: the inner shell expands it
        run_or_show srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
            --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" bash -c \
            'trap "" USR1 USR2
            exec "$PYTHON" -m "$LAUNCHER_MODULE" --hostfile "$0" --no_ssh --node_rank="$SLURM_NODEID" \
                --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module mt_deepspeed.train "$@"' \
            "$hostfile" ${arguments[@]+"${arguments[@]}"}
        ;;
    slurm)
        # It cannot start modules, and a script's own folder must not hide other packages: PYTHONSAFEPATH.
        export PYTHONSAFEPATH=1 PYTHONPATH=$REPO_ROOT${PYTHONPATH:+:$PYTHONPATH}
        run_or_show "$PYTHON" -m "$LAUNCHER_MODULE" --hostfile "$hostfile" --launcher slurm --no_ssh_check "${master[@]}" \
            --launcher_args "--ntasks-per-node=$slots --cpus-per-task=${SLURM_CPUS_PER_TASK:-1} --kill-on-bad-exit=1" \
            mt_deepspeed/train.py ${arguments[@]+"${arguments[@]}"}
        ;;
    pdsh)
        hand_on
        run_or_show "$PYTHON" -m "$LAUNCHER_MODULE" --hostfile "$hostfile" --launcher pdsh "${master[@]}" \
            --module mt_deepspeed.train ${arguments[@]+"${arguments[@]}"}
        ;;
esac
