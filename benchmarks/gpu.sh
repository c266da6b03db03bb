#!/usr/bin/env bash
# [4-1024-8-8] at 64x64 on one GPU, exactflow against the public formulation: see README.md here.
# usage: benchmarks/gpu.sh [FOLDER]     (default: $OUT, else runs/benchmarks)
# Ends within nine minutes; without a CUDA device it says so and ends with status 0.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="${1:-${OUT:-$root/runs/benchmarks}}"
python="${PYTHON:-python3}"
"$python" -c "import torch" 2>/dev/null || {
  echo "error: $python has no torch; name one that has: PYTHON=... benchmarks/gpu.sh" >&2
  exit 1
}
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec timeout --signal=INT --kill-after=10 535 "$python" "$root/benchmarks/gpu.py" --out "$folder"
