// Launchers of the upsampling kernels, through libtorch's stable C interface.
//
// DEEPLAB_FAST_WITHOUT_TORCH leaves them out: the kernels then compile with nvcc alone.
#include "deeplab_fast/upsample.cuh"

namespace deeplab_fast::cuda {

#define DEEPLAB_FAST_INSTANTIATE(T)                                                              \
  template __global__ void upsample_argmax_kernel<T>(const Logits<T>, const TilePlan, uint8_t*,  \
                                                     int64_t*, T*);                              \
  template __global__ void upsample_confusion_kernel<T>(const Logits<T>, const TilePlan,         \
                                                        const Labels, bool, unsigned long long*, \
                                                        unsigned long long*);                    \
  template __global__ void upsample_softmax_add_kernel<T, float>(                                \
      const Logits<T>, const TilePlan, const Accumulator<float>, bool);                          \
  template __global__ void upsample_softmax_add_kernel<T, double>(                               \
      const Logits<T>, const TilePlan, const Accumulator<double>, bool);                         \
  template __global__ void upsample_cross_entropy_kernel<T, false, false>(                       \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                   \
  template __global__ void upsample_cross_entropy_kernel<T, false, true>(                        \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                   \
  template __global__ void upsample_cross_entropy_kernel<T, true, false>(                        \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                   \
  template __global__ void upsample_cross_entropy_kernel<T, true, true>(                         \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                   \
  template __global__ void finish_cross_entropy_kernel<T>(const BlockSums*, int64_t, bool,       \
                                                          const T*, T*, T*, int64_t*);           \
  template __global__ void gather_gradient_kernel<T>(const T*, const T*, int, int, int, int,     \
                                                     int, Storage, void*)

DEEPLAB_FAST_INSTANTIATE(float);
DEEPLAB_FAST_INSTANTIATE(double);

#undef DEEPLAB_FAST_INSTANTIATE

}  // namespace deeplab_fast::cuda
