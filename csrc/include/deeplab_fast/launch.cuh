// How kernels are started, and the shared memory that they then have. Without torch.
//
// Headers named *_launch.cuh have the launches behind each op. Their `Launch` starts a kernel:
// launch(kernel, grid, arguments...). csrc/cuda/launch_ops.cuh has the one that does it on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deeplab_fast::cuda {

// Of a grid in one dimension.
constexpr int64_t kMaxBlocks = 2147483647;

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  // neighbouring blocks that run together
};

#if defined(__CUDACC__)
// The first byte of the dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(32) unsigned char deeplab_fast_shared[];
  return deeplab_fast_shared;
}
#endif

}  // namespace deeplab_fast::cuda
