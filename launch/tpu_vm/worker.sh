#!/usr/bin/env bash
# One worker of a TPU VM: sets up, starts, watches and stops the job's process. Every verb may be repeated.
#
#   worker.sh setup REVISION [NFS]      unpack code.tar.gz and install it, mount SERVER:/SHARE at /mnt/arcticjax
#   worker.sh start COMMAND...
#   worker.sh status                    prints: arcticjax-status HOST REVISION|none idle|running|ended [CODE]
#   worker.sh logs LINES
#   worker.sh stop
set -euo pipefail
umask 077

folder=$(cd "$(dirname "$0")" && pwd)
code="$folder/code"
readonly folder code
readonly stop_seconds="${ARCTICJAX_STOP_SECONDS:-120}"

running() {
  local pid
  pid=$(cat "$folder/pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

setup() {
  local revision=$1 nfs=${2:-}
  if [ -f "$folder/env" ]; then chmod 600 "$folder/env"; fi
  if [ -n "$nfs" ] && ! mountpoint -q /mnt/arcticjax; then
    sudo apt-get install -y -qq nfs-common
    sudo mkdir -p /mnt/arcticjax
    # There again after the machine restarts, or a run would write to the worker's own disk.
    grep -q " /mnt/arcticjax " /etc/fstab ||
      echo "$nfs /mnt/arcticjax nfs defaults,_netdev 0 0" | sudo tee -a /etc/fstab >/dev/null
    sudo mount /mnt/arcticjax
  fi
  if [ "$(cat "$folder/revision" 2>/dev/null)" = "$revision" ]; then
    echo "revision $revision is set up"
    return
  fi
  if running; then
    echo "a job is running; stop it before another revision is set up" >&2
    return 1
  fi
  rm -f "$folder/revision" "$folder/exit_code" "$folder/pid"
  rm -rf "$code"
  mkdir -p "$code"
  tar -xzf "$folder/code.tar.gz" -C "$code"
  command -v uv >/dev/null || [ -x "$HOME/.local/bin/uv" ] || python3 -m pip install --quiet --user uv
  (cd "$code" && PATH="$HOME/.local/bin:$PATH" uv sync --frozen --quiet --no-default-groups --extra tpu)
  echo "$revision" > "$folder/revision"
}

metadata() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

# Where the processes of all slices find each other, from what the metadata server tells of this one (the same sources
# as jax's own detection).
cluster() {
  local endpoints tpu_env coordinator slices slice worker
  endpoints=$(metadata worker-network-endpoints)
  worker=$(metadata agent-worker-number)
  tpu_env=$(metadata tpu-env || true)
  coordinator=$(sed -n "s/^MEGASCALE_COORDINATOR_ADDRESS: *'\{0,1\}\([^':]*\).*/\1/p" <<<"$tpu_env")
  slices=$(sed -n "s/^MEGASCALE_NUM_SLICES: *'\{0,1\}\([0-9]*\).*/\1/p" <<<"$tpu_env")
  slice=$(sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p" <<<"$tpu_env")
  local -a hosts
  IFS=, read -ra hosts <<<"$endpoints"
  : "${coordinator:=$(cut -d: -f3 <<<"${hosts[0]}")}"
  export ARCTICJAX_COORDINATOR="$coordinator:8482"
  export ARCTICJAX_PROCESSES=$((${#hosts[@]} * ${slices:-1}))
  export ARCTICJAX_PROCESS=$((${#hosts[@]} * ${slice:-0} + worker))
}

start() {
  if running; then
    echo "running already"
    return
  fi
  cluster
  if [ -f "$folder/env" ]; then
    set -a
    # shellcheck disable=SC1091
    . "$folder/env"
    set +a
  fi
  export PATH="$code/.venv/bin:$HOME/.local/bin:$PATH"
  cd "$code"
  rm -f "$folder/exit_code"
  # A session of its own: it stays when this connection ends. TERM goes to the command, which saves and ends.
  # shellcheck disable=SC2016
  setsid bash -c '
    folder=$1
    shift
    "$@" &
    child=$!
    trap "kill -TERM $child 2>/dev/null || true" TERM
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
      code=0
      wait "$child" || code=$?
    done
    echo "$code" > "$folder/exit_code.tmp"
    mv "$folder/exit_code.tmp" "$folder/exit_code"
  ' arcticjax "$folder" "$@" >> "$folder/log" 2>&1 < /dev/null &
  echo $! > "$folder/pid"
  echo "started as process $ARCTICJAX_PROCESS of $ARCTICJAX_PROCESSES"
}

status() {
  local state=idle
  if running; then
    state=running
  elif [ -f "$folder/exit_code" ]; then
    state="ended $(cat "$folder/exit_code")"
  elif [ -f "$folder/pid" ]; then
    # Without a word: the machine restarted, or the process was killed with its shell.
    state="ended 137"
  fi
  echo "arcticjax-status $(hostname) $(cat "$folder/revision" 2>/dev/null || echo none) $state"
}

stop() {
  local pid second
  if ! running; then
    echo "nothing runs"
    return
  fi
  pid=$(cat "$folder/pid")
  kill -TERM "$pid"
  for ((second = 0; second < stop_seconds; second++)); do
    if ! running; then return; fi
    sleep 1
  done
  kill -KILL -- "-$pid"
}

case ${1:-} in
  setup | start) "$@" ;;
  status | stop) "$1" ;;
  logs) tail -n "$2" "$folder/log" ;;
  *)
    sed -n 's/^#   //p' "$0" >&2
    exit 2
    ;;
esac
