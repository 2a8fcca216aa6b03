#!/usr/bin/env bash
# Every figure that a GPU can give, in one call:
#
#   benchmarks/gpu.sh OUT [LIMIT_SECONDS]
#
# Tables go to stdout and, with JSON beside them, into the folder OUT. Training figures compile side
# by side first, four at a time (what compilers try takes memory, too), then take turns; of the rest, what would begin after LIMIT_SECONDS (400) is
# left out and named, so that the call ends within some nine minutes. It installs nothing: $PYTHON
# must find arcticjax's packages, a jax that sees the GPU, torch and sentence-transformers. PAIRS
# names a Parquet file with columns query and document; without it, the docstrings of the packages
# that are installed are taken. DEVICE=cpu QUICK=1 runs the same commands on tiny shapes, without a
# GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:?"usage: benchmarks/gpu.sh OUT [LIMIT_SECONDS]"}
limit=${2:-400}
python=${PYTHON:-python}
device=${DEVICE:-gpu}
pairs=(${PAIRS:+--pairs "$PAIRS"})
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false XLA_PYTHON_CLIENT_PREALLOCATE=false
failed=0
waiting=()

run() {
  local name=$1
  shift
  if [ "$SECONDS" -ge "$limit" ]; then
    echo "== $name: left out, $SECONDS s have passed"
    return
  fi
  echo "== $name ($SECONDS s): python -m $*"
  "$python" -m "$@" --json "$out/$name.json" 2>"$out/$name.log" | tee "$out/$name.txt"
  if [ "${PIPESTATUS[0]}" -ne 0 ]; then
    failed=1
    tail -n 5 "$out/$name.log"
  fi
}

# In the background: it compiles while others do, and waits for its turn.
throughput() {
  local name=$1
  shift
  echo "== $name: python -m benchmarks.train_throughput $*"
  "$python" -m benchmarks.train_throughput --device "$device" --threads 0 "${pairs[@]}" \
    --precisions bfloat16 --turnstile "$out/turnstile" "$@" --json "$out/$name.json" \
    >"$out/$name.txt" 2>"$out/$name.log" &
  waiting+=("$name")
}

await() {
  wait
  for name in "${waiting[@]}"; do
    [ -s "$out/$name.json" ] && continue
    failed=1
    echo "== $name failed:"
    tail -n 5 "$out/$name.log"
  done
  waiting=()
}

finish() {
  "$python" -m benchmarks.gpu_table "$out"
  exit "$failed"
}

if [ -n "${QUICK:-}" ]; then
  run ceiling benchmarks.ceiling --size 64 --repeats 3
  throughput pretrain_xs --model xs --shapes 16/32 --batches 4 --turns 1 --warm 1
  await
  run encode benchmarks.encode "${pairs[@]}" --model xs --count 16 --caps 32 --repeats 1 --threads 0
  run loss benchmarks.loss --batches 128 --widths 32 --repeats 1 --threads 0
  run attention benchmarks.attention --head-sizes 8 --row-lengths 32 --tokens 64 --repeats 1
  finish
fi

common=(--steps 4 --turns 3 --warm 3)
throughput pretrain_m --model m --shapes 32/256 --batches 256 "${common[@]}"
throughput pretrain_xs --model xs --shapes 32/256 --batches 1024 "${common[@]}"
throughput pretrain_s --model s --shapes 32/256 --batches 512 "${common[@]}"
throughput pretrain_l --model l --shapes 32/256 --batches 128 "${common[@]}"
await
throughput finetune_m --model m --shapes 64/512 --batches 128 "${common[@]}"
throughput dense_m --model m --shapes 32/256 --batches 256 --dense "${common[@]}"
throughput cached_m --model m --shapes 32/256 --batches 1024 --steps 1 --turns 3 --warm 1 \
  --sides "sentence-transformers, cached" "arcticjax, two passes" arcticjax
await
echo "== all training figures ($SECONDS s)"
"$python" -m benchmarks.gpu_table "$out"
run ceiling benchmarks.ceiling
run encode benchmarks.encode "${pairs[@]}" --model m --dtype bfloat16 --threads 0 --count 4096 \
  --caps 256 --repeats 3
run loss benchmarks.loss --threads 0 --dtype bfloat16 --batches 8192 32768 --widths 768
run encode_float32 benchmarks.encode "${pairs[@]}" --model m --threads 0 --count 1024 --caps 256 \
  --repeats 2
run attention benchmarks.attention --implementations xla cudnn packed
finish
