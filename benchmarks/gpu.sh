#!/usr/bin/env bash
# Every figure that a GPU can give, in one call:
#
#   benchmarks/gpu.sh OUT [LIMIT_SECONDS]
#
# Tables go to stdout and, with JSON beside them, into the folder OUT. What would begin after
# LIMIT_SECONDS (500) is left out and named, so that the call ends within some nine minutes. It
# installs nothing: $PYTHON must find arcticjax's packages, a jax that sees the GPU, torch and
# sentence-transformers. DEVICE=cpu QUICK=1 runs the same commands on tiny shapes, without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: benchmarks/gpu.sh OUT [LIMIT_SECONDS]"}
limit=${2:-500}
python=${PYTHON:-python}
device=${DEVICE:-gpu}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false XLA_PYTHON_CLIENT_PREALLOCATE=false
# Compiled once for all commands of this call.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled}
failed=0

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

throughput() {
  local name=$1
  shift
  run "$name" benchmarks.train_throughput --device "$device" --threads 0 "$@"
}

finish() {
  echo "== all training figures"
  "$python" -m benchmarks.gpu_table "$out"
  exit "$failed"
}

if [ -n "${QUICK:-}" ]; then
  run ceiling benchmarks.ceiling --size 64 --repeats 3
  run encode benchmarks.encode --count 16 --caps 32 --repeats 1 --threads 0
  throughput pretrain_xs --model xs --shapes 16/32 --batches 4 --turns 1 --warm 1 \
    --precisions bfloat16
  run loss benchmarks.loss --batches 128 --widths 32 --repeats 1 --threads 0
  run attention benchmarks.attention --head-sizes 8 --row-lengths 32 --tokens 64 --repeats 1
  finish
fi

# Parity first: a fast wrong answer is none.
run ceiling benchmarks.ceiling
run encode benchmarks.encode --threads 0
run encode_half benchmarks.encode --threads 0 --dtype bfloat16 --caps 256
common=(--precisions bfloat16 --steps 4 --turns 5 --warm 4)
throughput pretrain_m --model m --shapes 32/256 --batches 256 "${common[@]}"
throughput pretrain_xs --model xs --shapes 32/256 --batches 1024 "${common[@]}"
run loss benchmarks.loss --threads 0
run attention benchmarks.attention
throughput pretrain_s --model s --shapes 32/256 --batches 1024 "${common[@]}"
throughput pretrain_l --model l --shapes 32/256 --batches 128 "${common[@]}"
throughput finetune_m --model m --shapes 64/512 --batches 128 "${common[@]}"
throughput dense_m --model m --shapes 32/256 --batches 256 --dense "${common[@]}"
throughput cached_m --model m --shapes 32/256 --batches 2048 "${common[@]}" --steps 1 --turns 3 \
  --sides "sentence-transformers, cached" "arcticjax, two passes" arcticjax
finish
