#!/usr/bin/env bash
# The tests that need a GPU, each suite in a process of its own, so that a fault in one does not spread.
#   benchmarks/gpu_checks.sh
set -uo pipefail
export HF_HUB_OFFLINE=1 PYTHONPATH="${PYTHONPATH:-}:$PWD/src:$PWD"
for suite in tests/kernels/test_gpu.py tests/kernels/test_attention.py tests/models/test_attention.py tests/models/test_decoder.py; do
  echo "== $suite"
  timeout 240 python3 -m pytest "$suite" -m gpu -q --tb=short --maxfail=4 -p no:cacheprovider 2>&1 | grep -v nanobind | grep -v "leaked" | tail -"${LINES_SHOWN:-30}" | cut -c1-200
done
