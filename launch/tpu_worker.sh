#!/usr/bin/env bash
# What each host of a TPU pod does; launch/tpu_pod.sh and launch/tpu_multislice.sh send it there
# and call it in the root of the repository's copy.
#
#   launch/tpu_worker.sh setup NFS_SERVER:/PATH | train ARGUMENTS | watch | stop
#
# Training is a systemd unit: it outlives the ssh connection, and `stop`, like the machine's own
# shutdown, sends SIGTERM, at which a run saves.
# Checked  with bash -n and shellcheck, and its calls against stand-ins of sudo and uv; no TPU.

set -euo pipefail

case "${1:?setup, train, watch or stop}" in
setup)
    # After boot the machine's own updates may hold apt's lock for a while: wait for it.
    sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common
    sudo mkdir -p /mnt/shared
    mountpoint -q /mnt/shared || sudo mount -t nfs "${2:?NFS_SERVER:/PATH}" /mnt/shared
    # The machine's own Python is older than 3.11.
    python3 -m pip install --user --quiet uv
    ~/.local/bin/uv venv --python 3.12 --allow-existing .venv
    ~/.local/bin/uv pip install --python .venv/bin/python '.[tpu]'
    ;;
train)
    sudo systemd-run --unit=rmjax --collect --uid="$(id -u)" --gid="$(id -g)" \
        --working-directory="$PWD" --setenv=HOME="$HOME" --property=TimeoutStopSec=600 \
        "$PWD/.venv/bin/python" -m rmjax.train "${@:2}"
    ;;
watch) sudo journalctl --unit=rmjax --follow --lines=100 --output=cat ;;
stop) sudo systemctl stop rmjax ;;
*)
    echo "$1: setup, train, watch or stop" >&2
    exit 1
    ;;
esac
