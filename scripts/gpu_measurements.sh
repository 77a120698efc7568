#!/usr/bin/env bash
# All measurements on one GPU, in under nine minutes; each part has a time limit, so that one that fails costs no other.
#
#   OUT=runs/gpu bash scripts/gpu_measurements.sh              on a CUDA machine
#   PARTS='train optim' OUT=... bash ...                       only these of: train optim losses target memory
#   PEER=/path/to/train_gpt_simple.py OUT=... bash ...         the public script and ours on the same tokens, nothing else
#   LIMIT_S=1200 OUT=... bash ...                              another limit for the whole
#   TINY=1 OUT=... bash ...                                    every part at a tiny size, on CPU: does it run?
#
# Leaves tables (.md, .json), logs and records below $OUT and prints the tables at the end.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-runs/gpu_measurements}")
PARTS=${PARTS:-$([ "${PEER:-}" ] && echo peer || echo train optim losses target memory)}
LIMIT_S=${LIMIT_S:-530}
PYTHON=$(realpath -s "$(command -v "${PYTHON:-python3}")") # not what a link of .venv leads to
mkdir -p "$OUT"
DATA=$(mktemp -d)
trap 'rm -rf "$DATA"' EXIT

BENCHMARK="$PYTHON scripts/benchmark.py"
if [ "${TINY:-}" ]; then
    export SPEEDRUN_DEVICE=cpu
    DEVICE=cpu NUM_FILES=20 PEER_STEPS=3
    SMALL=(--set model.num_layers=1 --set model.model_dim=16 --set model.num_heads=2 --set model.seq_len=16
        --set model.vocab_size=256 --set train.batch_tokens=64 --set train.compile=off)
    TRAIN=("${SMALL[@]}" --steps 2 --rounds 1 --profile) MEMORY=("${SMALL[@]}" --sizes 1 2)
    OPTIM=(--config configs/quick.toml --rounds 1)
    REAL=("${SMALL[@]}" --set train.steps=20 --set eval.tokens=64)
    QUICK=("${SMALL[@]}" --set train.steps=10 --set eval.tokens=64)
    OURS=("${SMALL[@]}" --set eval.tokens=64)
else
    DEVICE=cuda NUM_FILES=1500 PEER_STEPS=125
    TRAIN=(--steps 4 --rounds 3 --profile)
    # Of eight steps' worth of memory one is as good as another: a quarter of the batch.
    MEMORY=(--sizes 1 4 16 64 --set train.compile=off --set train.batch_tokens=131072)
    OPTIM=(--config configs/gpt2_small.toml --rounds 9)
    # Bytes of installed packages, an eighth of the batch, a hundred steps.
    REAL=(--set model.vocab_size=256 --set train.batch_tokens=65536 --set train.steps=100 --set eval.tokens=262144)
    QUICK=()
    OURS=()
fi
REPORT=()

# part NAME SECONDS COMMAND...: run it within its time and the whole's, its output to NAME.log.
part() {
    local name=$1 limit=$(($2 < LIMIT_S - SECONDS ? $2 : LIMIT_S - SECONDS)) begin=$SECONDS code=0
    shift 2
    if [ $limit -lt 5 ]; then REPORT+=("$name: no time left"); return; fi
    LOG="$OUT/$name.log" STOP=$((PEER_STEPS + 1)) timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    REPORT+=("$name: exit $code after $((SECONDS - begin)) s of $limit$([ $code = 0 ] || echo "; $(tail -n 1 "$OUT/$name.log")")")
}

nvidia-smi >"$OUT/nvidia-smi.log" 2>&1
wants() { [[ " $PARTS " == *" $1 "* ]]; }

wants train && part train 300 $BENCHMARK train --config configs/gpt2_small.toml --optimizers muon aurora adamw \
    "${TRAIN[@]}" --out "$OUT/train"
wants optim && part optim 60 $BENCHMARK optim --device $DEVICE "${OPTIM[@]}" \
    --rules muon normuon unormuon 'aurora folded' 'aurora iterated' --out "$OUT/optim"
packages() { $PYTHON -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
if wants losses; then
    mapfile -t FILES < <(find "$(packages)/torch" -name '*.py' -size +1k | LC_ALL=C sort | head -n "$NUM_FILES")
    part text 20 $PYTHON data/local.py --text "${FILES[@]}" --out "$DATA/text"
    part losses 140 $BENCHMARK runs --config configs/gpt2_small.toml --optimizers muon adamw aurora unormuon normuon \
        "${REAL[@]}" --set "data.train=$DATA/text/local_train_*.bin" --set "data.val=$DATA/text/local_val_*.bin" \
        --set data.allow_epochs=true --set eval.every=50 --set eval.late_every=50 --set eval.telemetry=false \
        --set optimizer.adamw.warmup_steps=5 --out "$OUT/losses"
fi
if wants target; then
    part corpus 20 $PYTHON data/local.py
    part target 100 $BENCHMARK runs --optimizers adamw muon unormuon aurora --seeds 0 1 2 "${QUICK[@]}" --out "$OUT/target"
fi
wants memory && part memory 50 $BENCHMARK memory --config configs/gpt2_small.toml --optimizers muon "${MEMORY[@]}" \
    --out "$OUT/memory"
for folder in losses target; do
    wants $folder && part "${folder}_report" 30 $PYTHON scripts/compare.py --report "$OUT/$folder" --out "$OUT/${folder}_report"
done

# The public script looks for FineWeb below the folder it runs in, and for 10,485,761 tokens of validation: bytes of all
# installed packages take its place. It is ended behind its validation at step 125, which ours has at its end; until
# then both have their peak lr.
if wants peer; then
    mkdir -p "$DATA/peer/data/fineweb10B"
    mapfile -t FILES < <(find "$(packages)" \( -name '*.py' -o -name '*.h' -o -name '*.pyi' \) -size +1k | LC_ALL=C sort)
    [ "${TINY:-}" ] && FILES=("${FILES[@]:0:$NUM_FILES}")
    part text 60 $PYTHON data/local.py --text "${FILES[@]}" --out "$DATA/text"
    for split in train val; do
        ln -s "$DATA/text/local_${split}_000000.bin" "$DATA/peer/data/fineweb10B/fineweb_${split}_000000.bin"
    done
    export PYTHONUNBUFFERED=1
    part public 250 bash -c 'cd "$0" && { "$@" & }
        until grep -q "^step:$STOP/" "$LOG" || ! kill -0 $! 2>/dev/null; do sleep 1; done
        kill $! 2>/dev/null; wait; grep -q "^step:$STOP/" "$LOG"' \
        "$DATA/peer" "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 "$(realpath "$PEER")"
    part ours 250 $PYTHON train_gpt.py --config configs/gpt2_small.toml --optimizer muon "${OURS[@]}" \
        --set "data.train=$DATA/text/local_train_*.bin" --set "data.val=$DATA/text/local_val_*.bin" \
        --set train.steps=$PEER_STEPS --set schedule.cooldown_frac=0 --set eval.late_every=125 \
        --set train.checkpoint_every=0 --out "$OUT/ours"
fi

for table in train optim memory; do
    [ -f "$OUT/$table.md" ] && sed '/^Quality/,$d' "$OUT/$table.md"
done
cat "$OUT"/*_report.log 2>/dev/null
for log in public ours; do
    [ -f "$OUT/$log.log" ] && grep "^step:.*train_time" "$OUT/$log.log" |
        awk -v name=$log '/val_loss/ { loss = $0 } { last = $0 } END { print name ": " loss; if (last != loss) print name ": " last }'
done
printf '%s\n' "${REPORT[@]}"
