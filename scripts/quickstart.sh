#!/usr/bin/env bash
# Environment, corpus, one run of every optimizer on configs/quick.toml, and their report. Arguments go to compare.py.
set -euo pipefail
here=$PWD
source "$(dirname "$0")/setup.sh"
setup train,report
ls data/local/local_train_*.bin data/local/local_val_*.bin >/dev/null 2>&1 || python data/local.py
root=$PWD
cd "$here" # where paths among the arguments begin
exec python "$root/scripts/compare.py" --out "$root/runs/quickstart" --jobs 2 "$@"
