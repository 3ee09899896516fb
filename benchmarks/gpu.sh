#!/usr/bin/env bash
# Checks and measures rmjax on one GPU (80 GB; meant for an H100) and writes a report: one command,
# meant to take under 8 minutes.
#
#   pip install -e '.[cuda12,test]' && benchmarks/gpu.sh [REPORT]
#
# REPORT (gpu_report.txt if not given) holds: the GPU and versions; tests/models/attention/test_gpu_cudnn.py, which holds
# attention in bfloat16, forward and backward, to float32's reference; attention by cuDNN against XLA;
# a training step and scoring of a Llama of 1B and of 8 layers of 8B, as a share of the measured peak.
set -uo pipefail
cd "$(dirname "$0")/.."

report=${1:-gpu_report.txt}
python=${PYTHON:-python}
export PYTHONPATH=${PYTHONPATH:-}:$PWD
export XLA_PYTHON_CLIENT_MEM_FRACTION=.92
unset JAX_PLATFORMS
failed=0

part() { # SECONDS TITLE COMMAND...
  local limit=$1 title=$2
  shift 2
  {
    echo
    echo "## $title"
    echo "\$ $*"
  } | tee -a "$report"
  # Standard output is the table; what goes to standard error is shown and not kept.
  if ! timeout "$limit" "$@" | tee -a "$report"; then
    echo "FAILED or longer than $limit s: $title" | tee -a "$report"
    failed=1
  fi
}

: >"$report"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee -a "$report"
"$python" -c 'import jax; assert jax.default_backend() == "gpu", jax.devices(); print("JAX", jax.__version__, jax.devices())' \
  | tee -a "$report" || exit 1

JAX_PLATFORMS=cuda,cpu part 120 "correctness" "$python" -m pytest -q tests/models/attention/test_gpu_cudnn.py
part 90 "attention" "$python" benchmarks/attention.py --shape=8b
part 110 "Llama 1B" "$python" benchmarks/roofline.py --shape=llama1b --length=4096 --rows=8 --microbatches=2
part 120 "8 layers of Llama 8B" \
  "$python" benchmarks/roofline.py --shape=llama8b --layers=8 --length=4096 --rows=4 --microbatches=2
echo
echo "report: $report"
exit "$failed"
