#!/usr/bin/env bash
# What a borrowed GPU machine need not build itself, made here without a GPU: the extensions for
# compute capability 9.0 with both variants of the sm_90a one, and Triton's cache. It becomes the
# ignored folder .gpu/ of at most 40 MiB, which travels beside the tracked files;
# `python -m bench.prepare_gpu unpack .gpu` installs it there.
#
#   bench/prepare_gpu.sh
#
#   PYTHON=.venv-oldest/bin/python   with the Python, torch and triton of the GPU machine; needs nvcc
#   MAX_JOBS                         compiler processes at a time
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

python=${PYTHON:-.venv-oldest/bin/python}
command -v "$python" >/dev/null || {
  echo "prepare_gpu: there is no $python: make test-oldest makes .venv-oldest, PYTHON names another"
  exit 1
}
# Not resolved: a virtual environment's python is a link to another.
python=$(cd "$(dirname "$(command -v "$python")")" && pwd)/$(basename "$python")
# What would change the build or the keys of the cache.
unset "${!TRITON_@}" "${!DEEPLAB_FAST_@}" TORCH_CUDA_ARCH_LIST DEBUG
work=$root/build/gpu-prepare
new=$work/folder

# copy_tree TO: the tracked and new files as they are; what ninja made in TO/build stays, and so do
# the times that it compares.
copy_tree() {
  mkdir -p "$1"
  find "$1" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      if [[ -e $file ]]; then printf '%s\0' "$file"; fi
    done |
    xargs -0 cp --parents --preserve=mode,timestamps -t "$1"
}

# step PYTHON-TREE ARGUMENTS...: the program of a tree, which imports the package from there.
step() {
  local tree=$1
  shift
  (cd "$tree" && PYTHONPATH=$tree "$python" -m bench.prepare_gpu "$@")
}

echo "== build"
copy_tree "$work/tree"
(
  cd "$work/tree" &&
    env DEEPLAB_FAST_BUILD_EXT=1 TORCH_CUDA_ARCH_LIST=9.0 \
      DEEPLAB_FAST_SM90_VARIANTS=nofence,acquire_cluster \
      "$python" setup.py build_ext --inplace >"$work/build.log" 2>&1
) || {
  tail -n 40 "$work/build.log"
  exit 1
}

echo "== Triton cache"
rm -rf "$work/cache" "$work/unpacked" "$new"
step "$work/tree" fill "$work/cache"

echo "== pack"
commit=$(git rev-parse HEAD)
[[ -z $(git status --porcelain) ]] || commit+=" with changes"
DEEPLAB_FAST_BENCH_COMMIT=$commit step "$work/tree" pack "$new" "$work/cache"

echo "== check: in a copy that was not built, with the cache in another folder"
copy_tree "$work/copy"
step "$work/copy" unpack "$new" --cache "$work/unpacked"
step "$work/copy" check
step "$work/copy" fill --full "$work/unpacked"
rm -rf "$work/copy" "$work/cache" "$work/unpacked"

rm -rf "$root/.gpu.old"
[[ ! -e $root/.gpu ]] || mv "$root/.gpu" "$root/.gpu.old"
mv "$new" "$root/.gpu"
rm -rf "$root/.gpu.old"
echo "== .gpu"
ls -l "$root/.gpu"
du -sh --apparent-size "$root/.gpu"
