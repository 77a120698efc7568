#!/usr/bin/env bash
# All measurements on one GPU, in under nine minutes; each part has a time limit, so that one that fails costs no other.
#
#   OUT=runs/gpu bash scripts/gpu_measurements.sh                     on a CUDA machine
#   PARTS='train optim' OUT=... bash ...                              only these of: train optim losses target memory peer
#   PEER='python /path/to/train_gpt_simple.py' OUT=... bash ...       the public script in turn with ours; not losses, target
#   TINY=1 OUT=... bash ...                                           every part at a tiny size, on CPU: does it run?
#
# Leaves tables (.md, .json), logs and records below $OUT and prints the tables at the end.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu_measurements}
DEFAULT_PARTS="train optim losses target memory"
[ "${PEER:-}" ] && DEFAULT_PARTS="train optim memory peer"
PARTS=${PARTS:-$DEFAULT_PARTS}
TOTAL_S=530
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
DATA=$(mktemp -d)
trap 'rm -rf "$DATA"' EXIT

BENCHMARK="$PYTHON scripts/benchmark.py"
if [ "${TINY:-}" ]; then
    export SPEEDRUN_DEVICE=cpu
    DEVICE=cpu NUM_FILES=20
    SMALL=(--set model.num_layers=1 --set model.model_dim=16 --set model.num_heads=2 --set model.seq_len=16
        --set model.vocab_size=256 --set train.batch_tokens=64 --set train.compile=off)
    TRAIN=("${SMALL[@]}" --steps 2 --rounds 1) MEMORY=("${SMALL[@]}" --sizes 1 2) OPTIM=(--config configs/quick.toml --rounds 1)
    REAL=("${SMALL[@]}" --set train.steps=20 --set eval.tokens=64)
    QUICK=("${SMALL[@]}" --set train.steps=10 --set eval.tokens=64)
else
    DEVICE=cuda NUM_FILES=1500
    TRAIN=(--set train.micro_batch=64 --steps 4 --rounds 3 --profile)
    MEMORY=(--sizes 1 4 16 64 --set train.compile=off) OPTIM=(--config configs/gpt2_small.toml --rounds 9)
    # Bytes of installed packages, an eighth of the batch, a hundred steps.
    REAL=(--set model.vocab_size=256 --set train.batch_tokens=65536 --set train.steps=100 --set eval.tokens=262144)
    QUICK=()
fi
RULES="muon normuon unormuon aurora adamw"
REPORT=()

# part NAME SECONDS COMMAND...: run it within its time and the whole's, its output to NAME.log.
part() {
    local name=$1 limit=$(($2 < TOTAL_S - SECONDS ? $2 : TOTAL_S - SECONDS)) begin=$SECONDS code=0
    shift 2
    if [ $limit -lt 5 ]; then REPORT+=("$name: no time left"); return; fi
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    REPORT+=("$name: exit $code after $((SECONDS - begin)) s of $limit$([ $code = 0 ] || echo "; $(tail -n 1 "$OUT/$name.log")")")
}

nvidia-smi >"$OUT/nvidia-smi.log" 2>&1
wants() { [[ " $PARTS " == *" $1 "* ]]; }

wants train && part train 220 $BENCHMARK train --config configs/gpt2_small.toml --optimizers muon aurora adamw \
    "${TRAIN[@]}" --out "$OUT/train"
wants optim && part optim 60 $BENCHMARK optim --device $DEVICE "${OPTIM[@]}" \
    --rules muon normuon unormuon 'aurora folded' 'aurora iterated' --out "$OUT/optim"
if wants losses; then
    PACKAGE=$($PYTHON -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')
    mapfile -t FILES < <(find "$PACKAGE" -name '*.py' -size +1k | LC_ALL=C sort | head -n "$NUM_FILES")
    part text 20 $PYTHON data/local.py --text "${FILES[@]}" --out "$DATA/text"
    part losses 140 $BENCHMARK runs --config configs/gpt2_small.toml --optimizers $RULES "${REAL[@]}" \
        --set "data.train=$DATA/text/local_train_*.bin" --set "data.val=$DATA/text/local_val_*.bin" \
        --set data.allow_epochs=true --set eval.every=50 --set eval.late_every=50 \
        --set optimizer.adamw.warmup_steps=5 --out "$OUT/losses"
fi
if wants target; then
    part corpus 20 $PYTHON data/local.py
    part target 100 $BENCHMARK runs --optimizers adamw muon unormuon aurora --seeds 0 1 2 "${QUICK[@]}" --out "$OUT/target"
fi
wants memory && part memory 50 $BENCHMARK memory --config configs/gpt2_small.toml --optimizers muon "${MEMORY[@]}" \
    --out "$OUT/memory"
wants peer && part peer 240 $BENCHMARK train --config configs/gpt2_small.toml --optimizers muon \
    --set train.micro_batch=64 --steps 10 --rounds 2 --peer "$PEER" --peer-limit-s 58 --out "$OUT/peer"
for folder in losses target; do
    wants $folder && part "${folder}_report" 30 $PYTHON scripts/compare.py --report "$OUT/$folder" --out "$OUT/${folder}_report"
done

for table in train optim memory peer; do
    [ -f "$OUT/$table.md" ] && sed '/^Quality/,$d' "$OUT/$table.md"
done
cat "$OUT"/*_report.log 2>/dev/null
printf '%s\n' "${REPORT[@]}"
