#!/usr/bin/env bash
# One command for a bare GPU machine: build in place, GPU tests, compute-sanitizer over small shapes,
# benchmarks. Needs torch, triton, torchvision, nvcc, pytest and pytest-benchmark; no network.
#
#   bench/gpu.sh [OUTPUT]          default: $OUT, else build/gpu
#
# Everything lands in OUTPUT as it comes, at most 8 files; what is there when it is cut off is kept.
# Each step has its own time limit, all together stay under 9 minutes.
#
#   STEPS="build tests sanitize bench"   which steps
#   BENCH_ARGS="-k 'aspp_head|model'"    further arguments of bench.run
#   PYTHON=python3                       the interpreter that has torch
#   SECONDS_BUILD, SECONDS_TESTS, SECONDS_SANITIZE, SECONDS_BENCH
#   DEEPLAB_FAST_BENCH_COMMIT            which commit it is, where the tree came without git
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${1:-${OUT:-$root/build/gpu}}")
cd "$root"

python=${PYTHON:-python3}
steps=${STEPS:-build tests sanitize bench}
# The sum is 8.5 minutes; benchmarks get what the steps before them leave.
total=510
build=${SECONDS_BUILD:-100}
tests=${SECONDS_TESTS:-90}
sanitize=${SECONDS_SANITIZE:-120}
begin=$SECONDS
export PYTHONUNBUFFERED=1

mkdir -p "$out"
summary=$out/summary.txt
: >"$summary"

wants() { [[ " $steps " == *" $1 "* ]]; }
left() { echo $((total - (SECONDS - begin))); }

# step NAME LIMIT COMMAND...: runs it with its output in NAME.log, and notes how it ended.
step() {
  local name=$1 limit=$2 status start=$SECONDS
  shift 2
  if ((limit < 5)); then
    echo "$name: not run, no time left" | tee -a "$summary"
    return 1
  fi
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) result=ok ;;
    124 | 137) result="cut off after $limit s" ;;
    *) result="failed with status $status" ;;
  esac
  echo "$name: $result, $((SECONDS - start)) s" | tee -a "$summary"
  return "$status"
}

smaller() { (($1 < $2)) && echo "$1" || echo "$2"; }

failed=0
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
} >>"$summary" 2>&1 || true

if wants build; then
  step build "$(smaller "$build" "$(left)")" \
    env MAX_JOBS="${MAX_JOBS:-$(nproc)}" "$python" setup.py build_ext --inplace || failed=1
  "$python" -m deeplab_fast.info >>"$summary" 2>&1 || failed=1
fi

if wants tests; then
  step tests "$(smaller "$tests" "$(left)")" \
    "$python" -m pytest tests/gpu -q -p no:cacheprovider || { [[ $? -eq 5 ]] || failed=1; }
fi

if wants sanitize; then
  if command -v compute-sanitizer >/dev/null; then
    # Without the caching allocator every tensor has its own bounds. A tool that is cut off leaves
    # time for the next.
    step sanitize "$(smaller "$sanitize" "$(left)")" \
      env PYTORCH_NO_CUDA_MEMORY_CACHING=1 EACH=$((sanitize / 3)) bash -c '
        status=0
        for tool in memcheck racecheck synccheck; do
          echo "-- $tool"
          timeout "$EACH" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$0" -m bench.sanitize || status=$?
        done
        exit $status' "$python" || failed=1
  else
    echo "sanitize: not run, compute-sanitizer is not on PATH" | tee -a "$summary"
  fi
fi

if wants bench; then
  limit=${SECONDS_BENCH:-$(left)}
  # Nothing new is begun in the last fifth: a case that compiles takes a minute.
  eval "extra=(${BENCH_ARGS:-})"
  step bench "$limit" "$python" -m bench.run --suite gpu --out "$out" \
    --time-budget $((limit * 4 / 5)) "${extra[@]}" || failed=1
  if [[ -f $out/gpu.csv ]]; then
    "$python" -m bench.report "$out/gpu.csv" >"$out/report.md" || failed=1
  fi
fi

echo "total: $((SECONDS - begin)) s, $( ((failed)) && echo "something failed" || echo ok)" |
  tee -a "$summary"
ls -l "$out"
exit "$failed"
