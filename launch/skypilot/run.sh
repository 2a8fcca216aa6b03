#!/usr/bin/env bash
# run.sh COMMAND...: one process of a run, on each host of a SkyPilot task.
set -euo pipefail

coordinator=$(head -n 1 <<<"$SKYPILOT_NODE_IPS")
export ARCTICJAX_COORDINATOR="$coordinator:8476"
export ARCTICJAX_PROCESSES="$SKYPILOT_NUM_NODES"
export ARCTICJAX_PROCESS="$SKYPILOT_NODE_RANK"
export PATH="$PWD/.venv/bin:$PATH"
exec "$@"
