#!/usr/bin/env bash
# Checks and measures rmjax on one NVIDIA GPU and writes what it finds to $OUT/gpu.md: one command,
# at most 8 minutes. Nobody has run it on a GPU yet.
#
#   benchmarks/gpu.sh --wheels DIR    where there is a network: packages that the image lacks
#   benchmarks/gpu.sh [DIR]           on the machine, which needs no network
#
# Needs    Python 3.12, JAX with its CUDA plugin (pip install 'jax[cuda13]'), flax, optax, orbax,
#          transformers, pytest; torch to compare with. DIR has the others of pyproject.toml, as
#          wheels; they are installed beside the image's, which stay what they are.
# Set      OUT: where gpu.md goes (runs/gpu if not given). PYTHON, if it is not `python`. What was
#          installed and written meanwhile is in a directory that is deleted.
# Gives    gpu.md, part by part as they end. Exit status 1 if a part failed or took too long.
# Parts    tests of the kernel against the definition; four steps of configs/quickstart.py; kernels
#          against each other (gpu_kernels.py); a training step and scoring of a Llama of 1B, and of
#          8 layers of 8B, since the state of all 32 takes 128 GB, as a share of the measured peak
#          (roofline.py); training and scoring against transformers (gpu_vs_transformers.py).
# Without a GPU the same parts run on tiny shapes, which shows that they run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}

# Of pyproject.toml's dependencies and theirs, what images with JAX and torch do not have; and what
# tokamax's attention imports.
lacking=(grain array-record cloudpickle portpicker ml-collections tensorboardX tokamax einshape
  immutabledict qwix pydantic pydantic-core annotated-types typing-inspection)

if [ "${1:-}" = --wheels ]; then
  platforms=()
  for glibc in 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
  done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    --dest "${2:?--wheels DIR: where to}" "${lacking[@]}" && du -sh "$2"
  exit
fi

limit=480 # seconds in all, on a GPU
out=${OUT:-runs/gpu}
report=$out/gpu.md
mkdir -p "$out" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ $# -gt 0 ]; then
  # Those that are not there. The image's own stay in place, and are not hidden.
  mapfile -t missing < <("$python" - "${lacking[@]}" <<'END'
import sys
from importlib.metadata import distributions
there = {each.name.lower().replace("_", "-") for each in distributions()}
print(*(name for name in sys.argv[1:] if name.lower() not in there), sep="\n")
END
  )
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --find-links "$1" --target "$work/site" "${missing[@]}" || exit 1
  PYTHONPATH=$PYTHONPATH:$work/site
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 COLUMNS=120
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}
failed=0

part() { # SECONDS TITLE COMMAND...: leaves SECONDS for the parts after it
  local seconds=$((limit - SECONDS - $1)) title=$2 began=$SECONDS
  shift 2
  {
    echo
    echo "## $title"
    echo
    echo "\`$*\`"
    echo
  } | tee -a "$report"
  # Standard output is the table; what goes to standard error is shown and not kept.
  if ! timeout --kill-after=5 "$seconds" "$@" | tee -a "$report"; then
    echo "FAILED, or longer than $seconds s" | tee -a "$report"
    failed=1
  fi
  printf '\n%s s\n' "$((SECONDS - began))" | tee -a "$report"
}

backend=$("$python" -c 'import jax; print(jax.default_backend())') || exit 1
{
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null \
    || echo "no GPU: tiny shapes, to show that everything runs; no figure means anything"
  "$python" -c 'import jax, sys; print("Python", sys.version.split()[0], "JAX", jax.__version__)'
} | tee "$report"

if [ "$backend" = gpu ]; then
  tested_on=cuda,cpu
  small=(--shape=llama1b --length=4096 --rows=8 --microbatches=2)
  large=(--shape=llama8b --layers=8 --length=4096 --rows=4 --microbatches=2)
else
  limit=3600
  tested_on=cpu
  small=(--shape=tiny --length=64 --prompt=8 --response=12)
  large=(--shape=tiny --layers=1 --length=64 --prompt=8 --response=12)
fi
part 400 "Attention is the definition" env JAX_PLATFORMS="$tested_on" \
  "$python" -m pytest -q -n 0 -p no:cacheprovider tests/models/attention/test_gpu_cudnn.py
part 350 "A run, from its data to its report" "$python" -m rmjax.train --config=configs/quickstart.py \
  --config.workdir="$work/run" --config.epochs=0 --config.steps=4 --config.eval_every=0
part 225 "Kernels against each other" "$python" benchmarks/gpu_kernels.py
part 170 "A step and scoring, Llama of 1B" "$python" benchmarks/roofline.py "${small[@]}"
part 110 "A step and scoring, 8 of 32 layers of 8B" "$python" benchmarks/roofline.py "${large[@]}"
part 0 "Against transformers, Llama of 1B" \
  "$python" benchmarks/gpu_vs_transformers.py --workdir="$work"
echo
echo "$report, after $SECONDS s"
exit "$failed"
