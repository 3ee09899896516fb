#!/usr/bin/env bash
# Trains on all the GPUs of this machine, in one process.
#
#   launch/gpu_node.sh --config=configs/llama8b_regression.py --config.workdir=runs/llama8b
#
# Set      nothing. PYTHON, if `python` is not the one with rmjax; CUDA_VISIBLE_DEVICES, for some
#          of the GPUs. Run in the root of the repository.
# Watch    its output; `tensorboard --logdir WORKDIR`.
# Stop     kill -TERM the process: it saves and ends.
# Resumes  the same command.
# Checked  with bash -n, shellcheck and a stand-in for Python; that XLA knows the flag; no GPU.

set -euo pipefail
# JAX takes 75 % of a GPU unless told otherwise; nothing else runs on these.
export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-.92}"
# Moves collectives so that they overlap with computation; NVIDIA's JAX images set it too.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

exec "${PYTHON:-python}" -m rmjax.train "$@"
