#!/usr/bin/env bash
# A run on all GPUs of this machine that goes on after faults: NPROC=8 RETRIES=3 bash scripts/launch.sh ARGUMENTS
# ARGUMENTS are those of train_gpt.py; set train.checkpoint_every, or a fault costs all that was done. A lost or hung
# rank, or one that was killed, starts the run again with --resume, up to RETRIES times. Everything else ends it, with
# the exit code of train_gpt.py, which torchrun itself would turn into 1. SIGTERM and Ctrl-C stop it with a checkpoint.
set -uo pipefail
cd "$(dirname "$0")/.."
RETRIES=${RETRIES:-3}
SPEEDRUN_STATUS=$(mktemp)
export SPEEDRUN_STATUS
trap 'rm -f "$SPEEDRUN_STATUS"' EXIT

run() {
    local code signal=""
    : >"$SPEEDRUN_STATUS"
    python -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-1}" train_gpt.py "$@" &
    trap 'signal=1; kill -TERM %% 2>/dev/null' TERM USR1 INT
    while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
    wait $!
    code=$?
    # The first of the ranks' codes that says more than "lost a peer"; none means that all were killed.
    [ "$code" = 0 ] || code=$(grep -vx -e 6 -e 0 "$SPEEDRUN_STATUS" | head -n 1)
    [ -n "$code" ] || { [ -n "$signal" ] && code=143; }
    return "${code:-6}"
}

python train_gpt.py "$@" --dry-run >/dev/null || exit # usage errors are told here, once
for ((SPEEDRUN_ATTEMPT = 0; ; SPEEDRUN_ATTEMPT++)); do
    export SPEEDRUN_ATTEMPT
    if [ "$SPEEDRUN_ATTEMPT" = 0 ]; then run "$@"; else run "$@" --resume; fi
    code=$?
    [ "$code" = 6 ] || exit "$code"
    if [ "$SPEEDRUN_ATTEMPT" -ge "$RETRIES" ]; then
        echo "launch: lost a rank $((RETRIES + 1)) times, giving up" >&2
        exit 6
    fi
    echo "launch: lost a rank, going on from the last checkpoint ($((SPEEDRUN_ATTEMPT + 1)) of $RETRIES)" >&2
done
