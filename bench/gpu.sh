#!/usr/bin/env bash
# Proves and measures everything on a CUDA device: op tests on every back end, memory checks on a
# few, then the benches. Needs no network: it uses the CUDA torch, pytest and ninja that are there.
# OUT (default bench/results): where logs, CSV and plots go.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "make gpu: no CUDA device (or no CUDA torch) here; nothing was run"
  exit 0
fi

OUT=${OUT:-bench/results}
mkdir -p "$OUT"
export FISHERKERN_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1
[ -d .venv-gpu ] || "$PYTHON" -m venv --system-site-packages .venv-gpu
.venv-gpu/bin/python -m pip install -q --no-index --no-build-isolation --no-deps -e .
run=.venv-gpu/bin/python
$run -m fisherkern.info | tee "$OUT/info.txt"

status=0
FISHERKERN_TEST_DEVICE=cuda FISHERKERN_TEST_BACKENDS=triton,cuda,reference \
  $run -m pytest -q --maxfail=40 -n "$MAX_JOBS" --dist worksteal tests/softmax_fisher tests/head_fisher \
    tests/covariance tests/operators 2>&1 | tee "$OUT/tests.log" || status=1
# no test of these depends on a back end, which leaves them out above
FISHERKERN_TEST_DEVICE=cuda $run -m pytest -q --maxfail=40 -n "$MAX_JOBS" --dist worksteal tests/optim \
  2>&1 | tee "$OUT/optim.log" || status=1
if command -v compute-sanitizer >/dev/null; then
  FISHERKERN_TEST_DEVICE=cuda FISHERKERN_TEST_BACKENDS=triton,cuda \
    compute-sanitizer --error-exitcode 9 $run -m pytest -q tests/softmax_fisher/test_truth.py \
    tests/covariance/test_truth.py -k '127 and dtype1' 2>&1 | tee "$OUT/sanitizer.log" || status=1
fi
for family in softmax_fisher covariance softmax_operator head_fisher; do
  mkdir -p "$OUT/$family"
  $run -m fisherkern.bench $family --device cuda --plots --output "$OUT/$family" \
    2>&1 | tee "$OUT/$family/report.txt" || status=1
done
exit $status
