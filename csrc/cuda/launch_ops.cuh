// What every CUDA op needs of torch, through libtorch's stable C interface: to start kernels and to
// get at tensors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "deeplab_fast/launch.cuh"

namespace deeplab_fast::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Starts kernels on the current stream of a device, which is current while this lives.
class Launch {
 public:
  explicit Launch(const Tensor& on) : device_(on.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), const Grid& grid,
                  const Arguments&... arguments) const {
    STD_TORCH_CHECK(grid.blocks <= kMaxBlocks, grid.blocks,
                    " blocks are more than a CUDA grid holds (", kMaxBlocks, "); split the batch");
    if (grid.shared_bytes > kDefaultSharedBytes) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(grid.shared_bytes)));
    }
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned int>(grid.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned int>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned int>(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream_;
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  int64_t attribute(cudaDeviceAttr name) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

 private:
  // What a block may have without asking for more.
  static constexpr size_t kDefaultSharedBytes = 48 * 1024;

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

template <typename V>
const V* read(const Tensor& tensor) {
  return static_cast<const V*>(tensor.const_data_ptr());
}

template <typename V>
V* write(Tensor& tensor) {
  return static_cast<V*>(tensor.mutable_data_ptr());
}

inline bool aligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

}  // namespace deeplab_fast::cuda
