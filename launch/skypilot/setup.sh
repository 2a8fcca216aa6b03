#!/usr/bin/env bash
# setup.sh EXTRA [NFS]: installs the source tree here with an accelerator's extra, and mounts SERVER:/SHARE at
# /mnt/arcticjax. May be repeated.
set -euo pipefail

extra=$1
nfs=${2:-}
if [ -n "$nfs" ] && ! mountpoint -q /mnt/arcticjax; then
  command -v mount.nfs >/dev/null || { sudo apt-get update -qq && sudo apt-get install -y -qq nfs-common; }
  sudo mkdir -p /mnt/arcticjax
  sudo mount -t nfs "$nfs" /mnt/arcticjax
fi
command -v uv >/dev/null || [ -x "$HOME/.local/bin/uv" ] || python3 -m pip install --quiet --user uv
PATH="$HOME/.local/bin:$PATH" uv sync --frozen --quiet --no-default-groups --extra "$extra"
