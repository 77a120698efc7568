#!/usr/bin/env bash
# A run on all GPUs of this machine that goes on after faults: NPROC=8 RETRIES=3 bash scripts/launch.sh ARGUMENTS
# ARGUMENTS are those of train_gpt.py; set train.checkpoint_every, or a fault costs all that was done. A lost or hung
# rank, or one that was killed, starts the run again with --resume, up to RETRIES times. Everything else ends it, with
# the exit code of train_gpt.py, which torchrun itself would turn into 1. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C stop it
# with a checkpoint (75), from its first line to its last.
set -uo pipefail
child="" stop=""
trap 'stop=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM HUP USR1 INT
train_gpt=$(dirname "${BASH_SOURCE[0]}")/../train_gpt.py
NPROC=${NPROC:-1} RETRIES=${RETRIES:-3}
if ! [[ $NPROC =~ ^([1-9][0-9]*|auto|gpu|cpu)$ && $RETRIES =~ ^[0-9]+$ ]]; then
    echo "launch: NPROC must be a number of processes from 1, RETRIES one from 0, got '$NPROC' and '$RETRIES'" >&2
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
    "$@" &
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
    SPEEDRUN_STATUS=$SPEEDRUN_STATUS run python -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$train_gpt" "$@"
    code=$?
    # torchrun had no rank yet, or has killed all.
    [ -z "$stop" ] || [ -s "$SPEEDRUN_STATUS" ] || return "$((code == 143 ? 75 : 143))"
    # The first of the ranks' codes that says more than "lost a peer"; none means that all were killed.
    [ "$code" = 0 ] || code=$(grep -vx -e 6 -e 0 "$SPEEDRUN_STATUS" | head -n 1)
    return "${code:-6}"
}

run python "$train_gpt" "$@" --dry-run >/dev/null # usage errors are told here, once
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
