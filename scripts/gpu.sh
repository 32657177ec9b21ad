#!/usr/bin/env bash
# The GPU suite, then the GPU benchmarks, within a budget, with the python3 on PATH as it is. No network, no venv.
#
#   scripts/gpu.sh MINUTES OUT [BENCHMARK ARGUMENTS…]
#
# OUT gets all that there is to know, at most eight files, each whole whenever this is ended: log.txt, junit.xml, and a
# file of results for each op of the benchmark. The failures by cause are in failures.txt until the suite has ended, then
# in the log, at whose end stand the minutes by stage.
#
# The suite may take 60 % of the budget and is stopped there; the benchmarks get what is left, and run also where the
# suite failed. Before them the CUDA sources' self-test, where it was built. The exit status is the first's that failed.
# SUITE is the folder of the tests.
set -uo pipefail
cd "$(dirname "$0")/.."
budget=$(awk -v minutes="${1:?expected the budget in minutes, got none}" 'BEGIN { print int(minutes * 60) }')
out=${2:?expected a folder for what comes back, got none}
shift 2
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
export PYTHONUNBUFFERED=1

# stage NAME LIMIT COMMAND…: at most so many seconds, with a line for the table at the end.
table=()
stage() {
    local name=$1 limit=$2 began=$SECONDS status verdict
    shift 2
    echo "== $name, at most $limit s"
    timeout --signal=INT --kill-after=10 "$limit" "$@"
    status=$?
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="STOPPED: it had not finished" ;;
        *) verdict="FAILED ($status)" ;;
    esac
    table+=("$(awk -v s=$((SECONDS - began)) 'BEGIN { printf "%5.1f", s / 60 }') min  $name: $verdict")
    echo "== $name: $verdict, $SECONDS s since the start"
    return $status
}

everything() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    # Without this, every test would be skipped and the run would look well.
    python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
        echo "expected a GPU that torch can use, got none" >&2
        return 1
    }
    [ -e peft_kernels/_lib/libpeft_kernels.so ] ||
        stage "building the native library" $((budget / 3)) python3 setup.py -q build_ext --inplace
    stage "what is here" 60 python3 -m peft_kernels env

    # Built by `make selftest`, where nvcc is; it needs nothing here.
    local selftest=0 suite bench left status
    [ -x build/selftest/selftest_gpu ] && { stage "the CUDA self-test" 90 build/selftest/selftest_gpu; selftest=$?; }

    # Compiling the kernels is most of the suite's time: spread it. One test at a time goes to a worker, so that they run
    # in the order that tests/gpu_suite.py gives them.
    local cores workers=() files
    cores=$(nproc)
    if python3 -c "import xdist" 2>/dev/null; then
        workers=(-n $((cores > 3 ? cores * 3 / 4 : 2)) --maxschedchunk 1 --max-worker-restart 1000)
    else
        echo "no pytest-xdist: the first test that hangs or loses the GPU ends the suite"
    fi
    # Only files with a GPU test: importing the others costs each worker seconds.
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' "${SUITE:-tests}" | sort)
    OMP_NUM_THREADS=1 stage "the GPU suite" $(((budget - SECONDS) * 60 / 100)) \
        python3 -m pytest -c pyproject.toml --rootdir . -p tests.gpu_suite --report "$out" -p no:faulthandler \
        -q -rN --tb=no -m gpu --continue-on-collection-errors "${workers[@]}" "${files[@]}"
    suite=$?
    echo "== failures by cause"
    cat "$out/failures.txt"
    rm -f "$out/failures.txt"

    # The benchmarks plan by --minutes; the limit is for one that does not come back. Status 3: a provider took the
    # process with it; the same command goes on without that one.
    while left=$((budget - SECONDS)); [ $left -gt 10 ]; do
        stage "the GPU benchmarks" $left python3 -m benchmarks run --device cuda --no-plots --out "$out" \
            --minutes "$(awk -v s=$left 'BEGIN { print (s - 5) / 60 }')" "$@"
        bench=$?
        [ $bench = 3 ] || break
    done

    echo "== minutes by stage"
    printf '%s\n' "${table[@]}"
    echo "== $(find "$out" -type f | wc -l) files in $out"
    for status in "$selftest" "$suite" "${bench:-124}"; do
        [ "$status" = 0 ] || return "$status"
    done
}

everything "$@" 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
