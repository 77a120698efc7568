#!/usr/bin/env bash
# A run on all GPUs of this machine that goes on after faults: NPROC=8 RETRIES=3 bash scripts/launch.sh ARGUMENTS
# On each of several nodes: NNODES=2 NODE_RANK=0 RDZV=HOST:PORT, where HOST is that of NODE_RANK 0. LOCAL_ADDR is the
# address of this node for the others, where its name leads elsewhere. scripts/slurm.sbatch sets all of these.
# ARGUMENTS are those of train_gpt.py; set train.checkpoint_every, or a fault costs all that was done. A lost or hung
# rank, or one that was killed, starts the run again with --resume, up to RETRIES times. Everything else ends it, with
# the exit code of train_gpt.py, which torchrun itself would turn into 1. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C stop it
# with a checkpoint (75), from its first line to its last.
set -uo pipefail
child="" stop=""
trap 'stop=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM HUP USR1 INT
train_gpt=$(dirname "${BASH_SOURCE[0]}")/../train_gpt.py
NPROC=${NPROC:-1} RETRIES=${RETRIES:-3} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} RDZV=${RDZV:-}
if ! [[ $NPROC =~ ^([1-9][0-9]*|auto|gpu|cpu)$ && $RETRIES =~ ^[0-9]+$ ]]; then
    echo "launch: NPROC must be a number of processes from 1, RETRIES one from 0, got '$NPROC' and '$RETRIES'" >&2
    exit 2
fi
if ! [[ $NNODES =~ ^[1-9][0-9]*$ && $NODE_RANK =~ ^[0-9]+$ ]] || [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "launch: NNODES must be a number from 1, NODE_RANK one below it, got '$NNODES' and '$NODE_RANK'" >&2
    exit 2
fi
if [ "$NNODES" = 1 ]; then
    nodes=(--standalone)
elif [[ $RDZV =~ ^[^:]+:[0-9]+$ ]]; then
    is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)
    nodes=(--nnodes="$NNODES" --rdzv_backend=c10d --rdzv_endpoint="$RDZV" --rdzv_id="${RDZV_ID:-speedrun}")
    nodes+=(--rdzv_conf="is_host=$is_host" ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"})
else
    echo "launch: with NNODES = $NNODES, RDZV must be HOST:PORT of NODE_RANK 0, got '$RDZV'" >&2
    exit 2
fi
SPEEDRUN_STATUS=$(mktemp)
trap 'rm -f "$SPEEDRUN_STATUS"' EXIT

nothing_to_save() {
    echo "launch: stopped before the run began, so there is nothing to save" >&2
    exit 75
}

run() { # a command, to its end; signals are handed on to it
    local code
    [ -z "$stop" ] || nothing_to_save
    (trap '' USR1 && exec "$@") & # Slurm warns all processes with SIGUSR1, of which torchrun would die
    child=$!
    [ -z "$stop" ] || kill -TERM "$child" 2>/dev/null
    while kill -0 "$child" 2>/dev/null; do wait "$child"; done
    wait "$child"
    code=$?
    child=""
    return "$code"
}

run_all() {
    local code
    : >"$SPEEDRUN_STATUS"
    SPEEDRUN_STATUS=$SPEEDRUN_STATUS run python -m torch.distributed.run "${nodes[@]}" --nproc_per_node="$NPROC" "$train_gpt" "$@"
    code=$?
    # torchrun had no rank yet, or has killed all.
    [ -z "$stop" ] || [ -s "$SPEEDRUN_STATUS" ] || return "$((code == 143 ? 75 : 143))"
    # The first of the ranks' codes that says more than "lost a peer"; none means that all were killed.
    [ "$code" = 0 ] || code=$(grep -vx -e 6 -e 0 "$SPEEDRUN_STATUS" | head -n 1)
    return "${code:-6}"
}

# Usage errors are told here, once. As the one rank of a run: srun's variables alone would be refused.
run env RANK=0 WORLD_SIZE=1 python "$train_gpt" "$@" --dry-run >/dev/null
code=$?
[ -z "$stop" ] || [ "$code" != 143 ] || nothing_to_save # Python had not come to its first line
[ "$code" = 0 ] || exit "$code"
for ((SPEEDRUN_ATTEMPT = 0; ; SPEEDRUN_ATTEMPT++)); do
    export SPEEDRUN_ATTEMPT
    if [ "$SPEEDRUN_ATTEMPT" = 0 ]; then run_all "$@"; else run_all "$@" --resume; fi
    code=$?
    [ "$code" = 6 ] || exit "$code"
    if [ "$SPEEDRUN_ATTEMPT" -ge "$RETRIES" ]; then
        echo "launch: lost a rank $((RETRIES + 1)) times, giving up" >&2
        exit 6
    fi
    echo "launch: lost a rank, going on from the last checkpoint ($((SPEEDRUN_ATTEMPT + 1)) of $RETRIES)" >&2
done
