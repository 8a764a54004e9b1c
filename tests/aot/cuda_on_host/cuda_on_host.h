// Runs CUDA kernels on the host, one block after the other, each thread of a block as a fibre. For
// tests: it checks what a kernel computes, not how fast, and nothing about memory order within a
// warp.
//
// Shared memory is filled with nan before each block and guarded behind its end. A barrier that not
// every thread of the block reaches is an error. Between barriers the threads run one after the
// other, forwards and backwards in turn, so that a missing barrier shows in the result.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "deeplab_fast/launch.cuh"

#define __global__
#define __device__
#define __launch_bounds__(...)

struct Index {
  unsigned int x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

namespace cuda_on_host {

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  bool finished = false;
};

inline ucontext_t scheduler;
inline std::vector<Fibre> fibres;
inline std::function<void()> body;
inline std::vector<unsigned char> shared;
inline unsigned int running;
inline bool backwards = false;

inline void enter() {
  body();
  fibres[running].finished = true;
  swapcontext(&fibres[running].context, &scheduler);
}

constexpr size_t kGuard = 4096;

// Lets every fibre run up to its next barrier or its end.
inline bool advance() {
  const unsigned int count = static_cast<unsigned int>(fibres.size());
  backwards = !backwards;
  unsigned int finished = 0;
  for (unsigned int i = 0; i < count; ++i) {
    running = backwards ? count - 1 - i : i;
    threadIdx.x = running;
    swapcontext(&scheduler, &fibres[running].context);
    finished += fibres[running].finished;
  }
  if (finished != 0 && finished != count) {
    throw std::runtime_error("a barrier that not all threads of the block reach");
  }
  return finished == 0;
}

inline void run_block(unsigned int threads, size_t shared_bytes) {
  shared.assign(shared_bytes + kGuard, 0xff);
  fibres.resize(threads);
  for (Fibre& fibre : fibres) {
    fibre.finished = false;
    fibre.stack.resize(64 * 1024);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
  }
  while (advance()) {
  }
  for (size_t i = shared_bytes; i < shared.size(); ++i) {
    if (shared[i] != 0xff) throw std::runtime_error("a write behind the shared memory");
  }
}

struct Launch {
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const deeplab_fast::cuda::Grid& grid,
                  const Arguments&... arguments) const {
    body = [&] { kernel(arguments...); };
    blockDim.x = static_cast<unsigned int>(grid.threads);
    gridDim.x = static_cast<unsigned int>(grid.blocks);
    for (int64_t block = 0; block < grid.blocks; ++block) {
      blockIdx.x = static_cast<unsigned int>(block);
      run_block(blockDim.x, grid.shared_bytes);
    }
  }
};

}  // namespace cuda_on_host

inline void __syncthreads() {
  swapcontext(&cuda_on_host::fibres[cuda_on_host::running].context, &cuda_on_host::scheduler);
}

namespace deeplab_fast::cuda {

inline unsigned char* shared_memory() { return cuda_on_host::shared.data(); }

}  // namespace deeplab_fast::cuda
