#!/usr/bin/env bash
# Environment, corpus, one run of every optimizer on the laptop track, and their report. Arguments go to compare.py.
set -euo pipefail
here=$PWD
source "$(dirname "$0")/setup.sh"
setup train,report
ls data/local/local_train_*.bin data/local/local_val_*.bin >/dev/null 2>&1 || python data/local.py
root=$PWD
track=quick
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    track=quick_bf16 # takes less than half of the time there
elif [[ " $* " != *" --config"* ]]; then
    echo "bfloat16 is not known to be fast on this CPU: configs/quick.toml, in float32"
fi
cd "$here" # where paths among the arguments begin
exec python "$root/scripts/compare.py" --config "$root/configs/$track.toml" --out "$root/runs/quickstart" --jobs 2 "$@"
