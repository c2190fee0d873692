#!/usr/bin/env bash
# The tests that need a GPU, each file in a process of its own, so that a fault in one does not spread.
#   benchmarks/gpu_checks.sh                   all of them
#   benchmarks/gpu_checks.sh tests/kernels     those under a folder, or single files
#   SECONDS_LEFT=300 benchmarks/gpu_checks.sh  start none after that
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="${PYTHONPATH:-}:$PWD/src:$PWD"
deadline=$((SECONDS + ${SECONDS_LEFT:-3600}))
failed=0
for suite in $(grep -rlE 'mark\.gpu\b' --include='test_*.py' "${@:-tests}" | sort); do
  left=$((deadline - SECONDS))
  if [ "$left" -lt 20 ]; then
    echo "== $suite: no time left"
    continue
  fi
  started=$SECONDS
  echo "== $suite"
  timeout "$((left < 300 ? left : 300))" python3 -m pytest "$suite" -m gpu --tb=short --maxfail=4 -p no:cacheprovider 2>&1 |
    grep -vE 'nanobind|leaked' | tail -"${LINES_SHOWN:-30}" | cut -c1-200
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed=$((failed + 1))
  echo "   $((SECONDS - started)) s"
done
echo "== $failed files with failures"
exit "$((failed > 0))"
