# shellcheck shell=bash
# What the job scripts of this folder share. It needs SLURM's commands, and Python with this package installed;
# no other file of the repository.

say() { printf '==> %s\n' "$*"; }

# fail WHAT FIX: stop the job.
fail() {
    printf '\nFAILED: %s\nWhat to do: %s\n' "$1" "$2" >&2
    exit 1
}

# find_python: set PYTHON, unless it is given: of the environment that was active at `sbatch`, else of .venv.
find_python() {
    local environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-$SLURM_SUBMIT_DIR/.venv}}
    PYTHON=${PYTHON:-$environment/bin/python}
    # DeepSpeed and torch look for `ninja` on PATH. (A Python inside a container is on the container's PATH.)
    if [ -x "$PYTHON" ]; then PATH=$(dirname -- "$PYTHON"):$PATH; fi
    export PATH PYTHON
}

# in_environment COMMAND...: run it once, inside the container if there is one.
# shellcheck disable=SC2086  # SRUN_OPTIONS and CONTAINER are options and commands: they have to fall into words
in_environment() {
    case ${SRUN_OPTIONS:-} in
        *--container-image*) srun --nodes=1 --ntasks=1 $SRUN_OPTIONS "$@" ;; # pyxis: only srun can enter it
        *) ${CONTAINER:-} "$@" ;;
    esac
}

# require MODULE...: stop now, and say why, if Python cannot find these.
require() {
    in_environment "$PYTHON" -c 'import sys; from importlib.util import find_spec
sys.exit(not all(find_spec(name) for name in sys.argv[1:]))' "$@" ||
        fail "$PYTHON on $(hostname) finds no $*" \
            "activate the environment before sbatch, or pass --export=ALL,PYTHON=/path/to/python"
}

# set_network: MASTER_ADDR and MASTER_PORT, unless they are given: the job's first node, a port made of the job's
# number (below the range that systems hand out by themselves). INTERFACE names the network card to use.
set_network() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    # The address SLURM itself uses for the node: host names need not resolve on the compute nodes.
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol -o show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' || true)}
    MASTER_ADDR=${MASTER_ADDR:-$first}
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
    export MASTER_ADDR MASTER_PORT
    if [ -n "${INTERFACE:-}" ]; then export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE; fi
}

# set_up MODULE...: what every job of ranks does first.
set_up() {
    find_python
    require "$@"
    set_network
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    say "$SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1))"
}

# start_ranks MODULE ARGUMENTS...: one srun task per rank. Tasks find their rank in SLURM's variables, and the
# first one that fails ends the others. The status is the highest of the ranks', 128 + the signal of a killed one.
# shellcheck disable=SC2086  # SRUN_OPTIONS and CONTAINER have to fall into words
start_ranks() {
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${SRUN_OPTIONS:-} \
        ${CONTAINER:-} "$PYTHON" -u -m "$@"
}

# train ARGUMENTS...: mt_deepspeed.train, and what its end asks for. Statuses: mt_deepspeed/engine/exit_codes.py.
train() {
    local run_dir status=0
    run_dir=$(run_folder "$@") || exit 2
    rm -f -- "$run_dir/requeue"
    set_deadline
    if [ -n "${LAUNCHER:-}" ]; then
        bash launchers/multi_node.sh --launcher "$LAUNCHER" --slots "${SLURM_NTASKS_PER_NODE:-1}" "$@" || status=$?
    else
        start_ranks mt_deepspeed.train "$@" || status=$?
    fi
    # Launchers lose the ranks' status; this file says the same.
    if [ -e "$run_dir/requeue" ]; then status=85; fi
    case $status in
        0) say "finished" ;;
        85) requeue "$run_dir" "the run has saved and stopped" ;;
        86) if [ -s "$run_dir/bad_nodes.txt" ]; then requeue "$run_dir" "the checks at the start refused a node"; fi ;;
        87) say "stopped: restarts without progress; the reason stands above" ;;
        88) requeue "$run_dir" "a rank hung" ;;
        *) if [ "$status" -gt 128 ]; then requeue "$run_dir" "a rank was killed (status $status)"; fi ;;
    esac
    exit "$status"
}

# set_deadline: MT_DEADLINE, the second at which SLURM ends this job; newer versions of SLURM say so themselves.
set_deadline() {
    local end
    end=$(job_field EndTime)
    if [ -z "${SLURM_JOB_END_TIME:-}" ] && [[ $end == 20* ]]; then
        MT_DEADLINE=$(date -d "$end" +%s)
        export MT_DEADLINE
    fi
}

# run_folder ARGUMENTS...: the run_dir of training arguments; wrong ones stop the job here, with their message.
run_folder() {
    local config
    config=$(in_environment "$PYTHON" -m mt_deepspeed.train "$@" --print-config) || return
    sed -n "s/^run_dir: *'\{0,1\}\(.*[^']\)'\{0,1\} *$/\1/p" <<<"$config"
}

# requeue RUN_DIR REASON: put this job back into the queue, without the nodes that RUN_DIR/bad_nodes.txt names.
# Returns if that cannot be.
requeue() {
    local bad=$1/bad_nodes.txt give_up=$((SECONDS + 600))
    if [ "$(job_field Requeue)" = 0 ]; then
        say "$2. This job may not be requeued: the same command again goes on from the last checkpoint"
        return
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
        say "$2. Stopped after ${SLURM_RESTART_COUNT:-0} restarts (MAX_RESTARTS): the same command again goes on"
        return
    fi
    say "$2: back to the queue"
    # SLURM now ends this script with the rest of the job; what follows has to run all the same.
    trap '' TERM
    until scontrol requeue "$SLURM_JOB_ID"; do
        # Somebody else did it (a node failed), or the controller does not answer: it may be on its way back.
        case $(job_field JobState) in "" | RUNNING) ;; *) break ;; esac
        if [ "$SECONDS" -gt "$give_up" ]; then
            say "SLURM does not take the job back: the same command again goes on from the last checkpoint"
            return
        fi
        sleep 5
    done
    # SLURM takes a list of nodes to avoid for waiting jobs only, so it comes after.
    if [ -s "$bad" ]; then
        say "avoiding from now on: $(tr '\n' ' ' <"$bad")"
        if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(avoided "$bad")"; then mv -- "$bad" "$bad.old"; fi
    fi
    exit 0
}

# avoided FILE: the nodes of FILE and those that this job avoids already, with commas.
avoided() {
    { job_field ExcNodeList | grep -v '^(null)$' | xargs -r scontrol show hostnames; cat "$1"; } | sort -u | paste -sd ,
}

# job_field NAME: one field of what SLURM knows about this job; nothing if it does not answer.
job_field() { scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p" || true; }
