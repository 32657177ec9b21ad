#!/usr/bin/env bash
# The GPU suite, then the GPU benchmarks, within a budget, with the python3 on PATH as it is.
#
#   scripts/gpu.sh MINUTES [BENCHMARK ARGUMENTS…]
#
# The suite may take 60 % of the budget and is stopped there; the benchmarks get what is left, and run also
# where the suite failed. Before them the CUDA sources' self-test, where it was built. The exit status is the first's that
# failed.
set -uo pipefail
cd "$(dirname "$0")/.."
budget=$((${1:?expected the budget in whole minutes, got none} * 60))
shift
suite_limit=$((budget * 60 / 100))
export PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
# Without this, every test would be skipped and the run would look well.
python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
    echo "expected a GPU that torch can use, got none" >&2
    exit 1
}
[ -e peft_kernels/_lib/libpeft_kernels.so ] || python3 setup.py -q build_ext --inplace
python3 -m peft_kernels env

# Built by `make selftest`, where nvcc is; it needs nothing here.
selftest=0
[ -x build/selftest/selftest_gpu ] && { timeout 90 build/selftest/selftest_gpu; selftest=$?; }

# Compiling the kernels is most of the suite's time: spread it, where xdist is there.
workers=()
python3 -c "import xdist" 2>/dev/null && workers=(-n 4)

echo "== the GPU suite, at most $suite_limit s"
timeout --signal=INT --kill-after=10 "$suite_limit" \
    python3 -m pytest -q -m gpu "${workers[@]}" tests --ignore=tests/interpret --ignore=tests/aot
suite=$?
case $suite in
    0) verdict=passed ;;
    124 | 137) verdict="STOPPED: it had not finished" ;;
    *) verdict="FAILED ($suite)" ;;
esac
echo "== the GPU suite: $verdict, $SECONDS s since the start"

left=$((budget - SECONDS))
echo "== the GPU benchmarks, at most $left s"
# The benchmarks plan by --minutes; the limit is for one that does not come back.
timeout --signal=INT --kill-after=10 "$left" \
    python3 -m benchmarks run --device cuda --minutes "$((left / 60)).$((left % 60 * 10 / 60))" "$@"
bench=$?
echo "== the GPU benchmarks: $([ $bench = 0 ] && echo done || echo "FAILED ($bench)"), $SECONDS s since the start"

[ "$selftest" = 0 ] || echo "== the CUDA self-test: FAILED ($selftest)"
for status in "$selftest" "$suite" "$bench"; do
    [ "$status" = 0 ] || exit "$status"
done
