#!/usr/bin/env bash
# Environment, corpus, one run of every optimizer on configs/quick.toml, table and curves. Arguments go to compare.py.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
setup train,report
ls data/local/local_train_*.bin data/local/local_val_*.bin >/dev/null 2>&1 || python data/local.py
exec python scripts/compare.py --out runs/quickstart --jobs 2 "$@"
