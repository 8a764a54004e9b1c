#!/usr/bin/env bash
# What a borrowed GPU is used for, in one command of at most 9 minutes: takes over what
# bench/prepare_gpu.sh made (.gpu/), or builds it, and runs python -m bench.gpu.
#
#   bench/gpu.sh [--second] [OUTPUT] [ARGUMENTS OF bench.gpu]     OUTPUT: $OUT, else build/gpu
#
# OUTPUT gets results.jsonl as results come, and gpu.log. --second takes 3 minutes, for what the
# first left open and what follows from it.
#
#   PYTHON=python3   the interpreter that has torch and triton
#   TOTAL=525        seconds of everything (the second: 175)
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
caller=$PWD
cd "$root"

python=${PYTHON:-python3}
arguments=()
total=${TOTAL:-525}
if [[ ${1:-} == --second ]]; then
  arguments+=(--second)
  total=${TOTAL:-175}
  shift
fi
out=${OUT:-$root/build/gpu}
if [[ -n ${1:-} && $1 != -* ]]; then
  out=$1
  shift
fi
[[ $out == /* ]] || out=$caller/$out
out=$(realpath -m "$out")
arguments+=("$@")
# Where a second run on the same machine finds the first.
kept=$root/build/gpu-first.jsonl
mkdir -p "$out" "$root/build"
export PYTHONUNBUFFERED=1 PYTHONPATH=$root

left() { echo $((total - SECONDS)); }

# take_over: extensions and Triton's cache of .gpu/; fails where extensions have to be built.
take_over() {
  local cache status
  [[ -f .gpu/manifest.json ]] || return 1
  cache=$(timeout 60 "$python" -m bench.prepare_gpu unpack .gpu)
  status=$?
  [[ -z $cache ]] || export TRITON_CACHE_DIR=$cache
  return "$status"
}

build() {
  local capability
  command -v nvcc >/dev/null || {
    echo "build: there is no nvcc; CUDA kernels that were not built before are missing"
    return 1
  }
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  # Compiling takes a minute or more; its time is that of the last phases.
  timeout --kill-after=5 120 env MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-${capability:-9.0}}" \
    "$python" setup.py build_ext --inplace >"$root/build/gpu-build.log" 2>&1 ||
    tail -n 30 "$root/build/gpu-build.log"
}

everything() {
  local status
  if take_over; then
    echo "prepared: .gpu, $SECONDS s"
  else
    build
    echo "built: $SECONDS s"
  fi
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/build/triton-cache}
  if [[ -z ${DEEPLAB_FAST_BENCH_COMMIT:-} ]] && ! git rev-parse HEAD >/dev/null 2>&1; then
    # The tree came without git.
    DEEPLAB_FAST_BENCH_COMMIT=$(sed -n 's/.*"commit": "\([^"]*\)".*/\1/p' .gpu/manifest.json \
      2>/dev/null)
    export DEEPLAB_FAST_BENCH_COMMIT
  fi
  [[ ! -f $kept ]] || arguments+=(--first "$kept")
  # It ends by itself; what does not is killed.
  timeout --kill-after=5 $(($(left) + 8)) \
    "$python" -m bench.gpu --out "$out" --budget "$(left)" "${arguments[@]}"
  status=$?
  [[ ! -f $out/results.jsonl ]] || cp "$out/results.jsonl" "$kept"
  echo "$SECONDS s, exit status $status"
  return "$status"
}

everything 2>&1 | tee "$out/gpu.log"
exit "${PIPESTATUS[0]}"
