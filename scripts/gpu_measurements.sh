#!/usr/bin/env bash
# Measurements on one GPU, in under nine minutes; each part has a time limit, so that one that fails costs no other:
#
#   turns     the public script and ours in turns, the same tokens; with PEER alone
#   kernels   our step with and without each of our kernels, in turns, at trained weights
#   short     configs/gpt2_small_short.toml with four optimizers and three seeds each, to a target that a pilot run sets,
#             and what their rows and neurons do after 100, 250 and 500 steps
#
# On demand: target (four optimizers on the laptop track), train, optim, memory (speed and memory of parts), losses.
#
#   OUT=runs/gpu bash scripts/gpu_measurements.sh              on a CUDA machine
#   PEER=/path/to/train_gpt_simple.py OUT=... bash ...         with turns, first
#   PARTS='train optim' OUT=... bash ...                       only these, in the script's order
#   LIMIT_S=1200 OUT=... bash ...                              another limit for the whole
#   TINY=1 OUT=... bash ...                                    every part at a tiny size, on CPU: does it run?
#
# Leaves tables (.md, .json), logs and records below $OUT and prints the tables at the end.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-runs/gpu_measurements}")
PARTS=${PARTS:-${PEER:+turns} kernels short}
LIMIT_S=${LIMIT_S:-530}
PYTHON=$(realpath -s "$(command -v "${PYTHON:-python3}")") # not what a link of .venv leads to
mkdir -p "$OUT"
DATA=$(mktemp -d)
trap 'rm -rf "$DATA"' EXIT
export PYTHONUNBUFFERED=1

BENCHMARK="$PYTHON scripts/benchmark.py"
GPT2="--config configs/gpt2_small.toml"
if [ "${TINY:-}" ]; then
    export SPEEDRUN_DEVICE=cpu
    DEVICE=cpu NUM_FILES=20
    SMALL=(--set model.num_layers=1 --set model.model_dim=16 --set model.num_heads=2 --set model.seq_len=16
        --set model.vocab_size=256 --set model.activation_dtype=float32 --set train.batch_tokens=64
        --set train.compile=off)
    TURNS=(--val-tokens 64 --steps 16 --every 8 --set train.micro_batch=4 "${SMALL[@]}")
    TRAIN=("${SMALL[@]}" --steps 2 --rounds 1 --profile) MEMORY=("${SMALL[@]}" --sizes 1 2)
    OPTIM=(--config configs/quick.toml --rounds 1)
    REAL=("${SMALL[@]}" --set train.steps=20 --set eval.tokens=64)
    QUICK=("${SMALL[@]}" --set train.steps=10 --set eval.tokens=64)
    KERNELS=("${SMALL[@]}" --set model.seq_len=128 --set train.batch_tokens=128 --set eval.tokens=128 --train-steps 3
        --steps 2 --rounds 2)
    SHORT=("${SMALL[@]}" --set train.steps=10 --set eval.tokens=64 --set eval.every=5 --set optimizer.adamw.warmup_steps=2)
    LEVERAGE=(5 10)
else
    DEVICE=cuda NUM_FILES=8000
    # Both programs are on the GPU at once, so a card of 80 GB needs a smaller micro-batch.
    TURNS=(--steps 50 --every 25 --limit-s $((LIMIT_S < 290 ? LIMIT_S - 120 : 170)) --set train.micro_batch=128)
    # A quarter of the batch: the share of the kernels does not depend on how many micro-steps a step has.
    KERNELS=(--set train.batch_tokens=131072 --set train.micro_batch=64)
    SHORT=() LEVERAGE=(100 250 500)
    TRAIN=(--steps 4 --rounds 3 --profile)
    # A quarter of the batch: the memory of a step does not depend on how many micro-steps it has.
    MEMORY=(--sizes 1 4 16 64 --set train.compile=off --set train.batch_tokens=131072)
    OPTIM=("$GPT2" --rounds 9)
    # An eighth of the batch, a hundred steps.
    REAL=(--set model.vocab_size=256 --set train.batch_tokens=65536 --set train.steps=100 --set eval.tokens=262144)
    QUICK=()
fi
REPORT=()

# part NAME SECONDS COMMAND...: run it within its time and the whole's, its output to NAME.log.
part() {
    local name=$1 limit=$(($2 < LIMIT_S - SECONDS ? $2 : LIMIT_S - SECONDS)) begin=$SECONDS code=0
    shift 2
    if [ $limit -lt 5 ]; then REPORT+=("$name: no time left"); return; fi
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    REPORT+=("$name: exit $code after $((SECONDS - begin)) s of $limit$([ $code = 0 ] || echo "; $(tail -n 1 "$OUT/$name.log")")")
}

nvidia-smi >"$OUT/nvidia-smi.log" 2>&1
wants() { [[ " $PARTS " == *" $1 "* ]]; }

if wants turns || wants kernels || wants short || wants losses; then # bytes of all installed packages
    packages=$($PYTHON -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    mapfile -t FILES < <(find "$packages" \( -name '*.py' -o -name '*.h' -o -name '*.pyi' \) -size +1k |
        LC_ALL=C sort | head -n "$NUM_FILES")
    part text 60 $PYTHON data/local.py --text "${FILES[@]}" --out "$DATA/text"
fi
TEXT=(--set "data.train=$DATA/text/local_train_*.bin" --set "data.val=$DATA/text/local_val_*.bin"
    --set data.allow_epochs=true)
wants turns && part turns 190 $BENCHMARK turns --peer "${PEER:?names the public script}" \
    --train "$DATA/text/local_train_000000.bin" --val "$DATA/text/local_val_000000.bin" "${TURNS[@]}" --out "$OUT/turns"
wants kernels && part kernels 130 $BENCHMARK kernels "${KERNELS[@]}" "${TEXT[@]}" --out "$OUT/kernels"
if wants short; then
    part short 300 $BENCHMARK runs --config configs/gpt2_small_short.toml --optimizers muon adamw unormuon aurora \
        --seeds 0 1 2 --pilot adamw "${SHORT[@]}" "${TEXT[@]}" --out "$OUT/short"
    part leverage 20 $PYTHON scripts/plot.py neurons "$OUT/short" --steps "${LEVERAGE[@]}"
fi
if wants target; then
    part corpus 20 $PYTHON data/local.py
    part target 110 $BENCHMARK runs --optimizers adamw muon unormuon aurora --seeds 0 1 2 "${QUICK[@]}" --out "$OUT/target"
fi
wants train && part train 180 $BENCHMARK train $GPT2 --optimizers muon aurora adamw "${TRAIN[@]}" --out "$OUT/train"
for schedule in polar_express5 quintic12; do
    wants optim && part optim_$schedule 40 $BENCHMARK optim --device $DEVICE ${OPTIM[@]} --schedule $schedule \
        --rules muon normuon unormuon 'aurora folded' 'aurora iterated' --out "$OUT/optim_$schedule"
done
wants memory && part memory 50 $BENCHMARK memory $GPT2 --optimizers muon "${MEMORY[@]}" --out "$OUT/memory"
wants losses && part losses 200 $BENCHMARK runs $GPT2 --optimizers muon adamw aurora unormuon normuon \
    "${REAL[@]}" "${TEXT[@]}" --set eval.every=50 --set eval.late_every=50 --set eval.telemetry=false \
    --set optimizer.adamw.warmup_steps=5 --out "$OUT/losses"
for folder in short target losses; do
    wants $folder && part "${folder}_report" 30 $PYTHON scripts/compare.py --report "$OUT/$folder" --out "$OUT/${folder}_report"
done

for table in turns kernels train optim_polar_express5 optim_quintic12 memory; do
    [ -f "$OUT/$table.md" ] && sed '/^Quality/,$d' "$OUT/$table.md"
done
cat "$OUT"/leverage.log "$OUT"/*_report.log 2>/dev/null
printf '%s\n' "${REPORT[@]}"
