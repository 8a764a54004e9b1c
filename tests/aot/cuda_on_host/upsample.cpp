// The CUDA kernels of the upsampling ops and their launches, on the host, for ctypes.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cuda_on_host.h"
#include "deeplab_fast/upsample_launch.cuh"

using namespace deeplab_fast;
using namespace deeplab_fast::cuda;

namespace {

const cuda_on_host::Launch launch;
std::string error;

// Sizes: images, classes, height, width, out_height, out_width. Strides: image, class, row, column.
template <typename T>
Logits<T> make_logits(const T* data, const int64_t* sizes, const int64_t* strides, bool corners) {
  const auto size = [&](int i) { return static_cast<int>(sizes[i]); };
  return {data,
          Storage::kFull,
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          size(0),
          size(1),
          make_axis<T>(size(2), size(4), corners),
          make_axis<T>(size(3), size(5), corners)};
}

template <typename T>
TilePlan tiles(const Logits<T>& logits) {
  return plan_tiles(logits.images, logits.classes, logits.rows, logits.columns);
}

// nan where nothing is written.
template <typename V>
std::vector<V> unwritten(int64_t count) {
  return std::vector<V>(count, std::numeric_limits<V>::quiet_NaN());
}

template <typename Function>
int guarded(const Function& function) {
  try {
    function();
    return 0;
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
}

template <typename T>
int argmax(const T* data, const int64_t* sizes, const int64_t* strides, bool corners,
           uint8_t* narrow, int64_t* wide, T* prob) {
  return guarded([&] {
    const Logits<T> logits = make_logits(data, sizes, strides, corners);
    launch_argmax(launch, logits, tiles(logits), narrow, wide, prob);
  });
}

template <typename T>
int confusion(const T* data, const int64_t* sizes, const int64_t* strides, bool corners,
              const int64_t* labels, int64_t ignore_index, int64_t shared_limit, int64_t* matrix,
              int64_t* bad) {
  return guarded([&] {
    const Logits<T> logits = make_logits(data, sizes, strides, corners);
    launch_confusion(launch, logits, tiles(logits), {labels, LabelType::kInt64, ignore_index},
                     shared_limit, 5, reinterpret_cast<unsigned long long*>(matrix),
                     reinterpret_cast<unsigned long long*>(bad));
  });
}

template <typename T>
int softmax_add(const T* data, const int64_t* sizes, const int64_t* strides, bool corners, T* to,
                const int64_t* to_strides, bool flip) {
  return guarded([&] {
    const Logits<T> logits = make_logits(data, sizes, strides, corners);
    const Accumulator<T> accumulator = {to, to_strides[0], to_strides[1], to_strides[2],
                                        to_strides[3]};
    launch_softmax_add(launch, logits, tiles(logits), accumulator, flip);
  });
}

// loss [1], pixel_loss and grad may be null; pixel_grad too.
template <typename T>
int cross_entropy(const T* data, const int64_t* sizes, const int64_t* strides, bool corners,
                  const int64_t* labels, int64_t ignore_index, const T* weight, const T* weight_sum,
                  double smoothing, bool mean, const T* upstream, const T* pixel_grad, T* loss,
                  T* pixel_loss, T* grad, int64_t* bad, int64_t* plan_out) {
  return guarded([&] {
    const Logits<T> logits = make_logits(data, sizes, strides, corners);
    const CellPlan plan =
        plan_cells(logits.images, logits.classes, logits.rows, logits.columns, grad != nullptr);
    std::vector<BlockSums> sums(plan.blocks);
    std::vector<T> partial = unwritten<T>(
        grad ? partial_size(plan, logits.images, logits.classes, logits.rows, logits.columns) : 0);
    CrossEntropy<T> op{};
    op.labels = {labels, LabelType::kInt64, ignore_index};
    op.class_weights = weight;
    op.weight_sum = weight_sum;
    op.smoothing = static_cast<T>(smoothing);
    op.pixel_grad = pixel_grad;
    op.pixel_loss = pixel_loss;
    op.sums = sums.data();
    op.partial = grad ? partial.data() : nullptr;
    launch_cross_entropy(launch, logits, plan, op);
    T scale = std::numeric_limits<T>::quiet_NaN();
    launch_finish(launch, sums.data(), plan, mean, upstream, loss, &scale, bad);
    if (grad) launch_gather(launch, logits, plan, partial.data(), &scale, Storage::kFull, grad);
    plan_out[0] = plan.threads;
    plan_out[1] = plan.cells;
    plan_out[2] = plan.splits;
    plan_out[3] = plan.stage_classes;
  });
}

}  // namespace

extern "C" {

const char* last_error() { return error.c_str(); }

// Dynamic shared memory in bytes of the fp32 kernels: the label kernels', and that of cross entropy
// with gradient.
void shared_bytes(const int64_t* sizes, int64_t* out) {
  const int64_t strides[4] = {};
  const Logits<float> logits = make_logits<float>(nullptr, sizes, strides, false);
  const CellPlan cells =
      plan_cells(logits.images, logits.classes, logits.rows, logits.columns, true);
  out[0] = static_cast<int64_t>(tiles(logits).shared_bytes);
  out[1] = static_cast<int64_t>(sizeof(PixelMemory<float>) + cells.stage_bytes);
}

#define DEEPLAB_FAST_EXPORT(T, suffix)                                                            \
  int argmax_##suffix(const T* data, const int64_t* sizes, const int64_t* strides, bool corners,  \
                      uint8_t* narrow, int64_t* wide, T* prob) {                                  \
    return argmax(data, sizes, strides, corners, narrow, wide, prob);                             \
  }                                                                                               \
  int confusion_##suffix(const T* data, const int64_t* sizes, const int64_t* strides,             \
                         bool corners, const int64_t* labels, int64_t ignore_index,               \
                         int64_t shared_limit, int64_t* matrix, int64_t* bad) {                   \
    return confusion(data, sizes, strides, corners, labels, ignore_index, shared_limit, matrix,   \
                     bad);                                                                        \
  }                                                                                               \
  int softmax_add_##suffix(const T* data, const int64_t* sizes, const int64_t* strides,           \
                           bool corners, T* to, const int64_t* to_strides, bool flip) {           \
    return softmax_add(data, sizes, strides, corners, to, to_strides, flip);                      \
  }                                                                                               \
  int cross_entropy_##suffix(const T* data, const int64_t* sizes, const int64_t* strides,         \
                             bool corners, const int64_t* labels, int64_t ignore_index,           \
                             const T* weight, const T* weight_sum, double smoothing, bool mean,   \
                             const T* upstream, const T* pixel_grad, T* loss, T* pixel_loss,      \
                             T* grad, int64_t* bad, int64_t* plan_out) {                          \
    return cross_entropy(data, sizes, strides, corners, labels, ignore_index, weight, weight_sum, \
                         smoothing, mean, upstream, pixel_grad, loss, pixel_loss, grad, bad,      \
                         plan_out);                                                               \
  }

DEEPLAB_FAST_EXPORT(float, float)
DEEPLAB_FAST_EXPORT(double, double)

}  // extern "C"
