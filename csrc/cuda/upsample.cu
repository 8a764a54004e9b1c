// The upsampling ops on CUDA tensors, through libtorch's stable C interface.
//
// With DEEPLAB_FAST_WITHOUT_TORCH only the kernels are compiled, by nvcc alone: tests look at what
// they take of registers and shared memory where there is neither a GPU nor a torch with CUDA.
#include "deeplab_fast/upsample_launch.cuh"

#ifdef DEEPLAB_FAST_WITHOUT_TORCH

namespace deeplab_fast::cuda {

#define DEEPLAB_FAST_INSTANTIATE(T)                                                               \
  template __global__ void upsample_argmax_kernel<T>(const Logits<T>, const TilePlan, uint8_t*,   \
                                                     int64_t*, T*);                               \
  template __global__ void upsample_confusion_kernel<T>(const Logits<T>, const TilePlan,          \
                                                        const Labels, bool, unsigned long long*,  \
                                                        unsigned long long*);                     \
  template __global__ void upsample_softmax_add_kernel<T, float>(const Logits<T>, const TilePlan, \
                                                                 const Accumulator<float>, bool); \
  template __global__ void upsample_softmax_add_kernel<T, double>(                                \
      const Logits<T>, const TilePlan, const Accumulator<double>, bool);                          \
  template __global__ void upsample_cross_entropy_kernel<T, false, false>(                        \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                    \
  template __global__ void upsample_cross_entropy_kernel<T, false, true>(                         \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                    \
  template __global__ void upsample_cross_entropy_kernel<T, true, false>(                         \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                    \
  template __global__ void upsample_cross_entropy_kernel<T, true, true>(                          \
      const Logits<T>, const CellPlan, const CrossEntropy<T>);                                    \
  template __global__ void finish_cross_entropy_kernel<T>(const BlockSums*, int64_t, bool,        \
                                                          const T*, T*, T*, int64_t*);            \
  template __global__ void gather_gradient_kernel<T>(const T*, const T*, int, int, int, int, int, \
                                                     Storage, void*)

DEEPLAB_FAST_INSTANTIATE(float);
DEEPLAB_FAST_INSTANTIATE(double);

#undef DEEPLAB_FAST_INSTANTIATE

}  // namespace deeplab_fast::cuda

#else

#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "launch_ops.cuh"

namespace deeplab_fast::cuda {

namespace {

// Calls function(T{}) with the type that logits are computed in.
template <typename Function>
auto with_compute_type(const Tensor& logits, const Function& function) {
  return logits.scalar_type() == ScalarType::Double ? function(double{}) : function(float{});
}

template <typename T>
constexpr ScalarType scalar_type() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

Storage storage_of(const Tensor& logits) {
  if (logits.scalar_type() == ScalarType::Half) return Storage::kHalf;
  if (logits.scalar_type() == ScalarType::BFloat16) return Storage::kBfloat16;
  return Storage::kFull;
}

int checked_size(int64_t size) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int>::max() / 2, "a size of ", size, " is too large");
  return static_cast<int>(size);
}

template <typename T>
Logits<T> describe(const Tensor& logits, int64_t out_height, int64_t out_width,
                   bool align_corners) {
  return {logits.const_data_ptr(),
          storage_of(logits),
          logits.stride(0),
          logits.stride(1),
          logits.stride(2),
          logits.stride(3),
          checked_size(logits.size(0)),
          checked_size(logits.size(1)),
          make_axis<T>(checked_size(logits.size(2)), checked_size(out_height), align_corners),
          make_axis<T>(checked_size(logits.size(3)), checked_size(out_width), align_corners)};
}

template <typename T>
TilePlan tiles_of(const Logits<T>& logits) {
  return plan_tiles(logits.images, logits.classes, logits.rows, logits.columns);
}

Labels describe_labels(const Tensor& target, int64_t ignore_index) {
  LabelType type = LabelType::kInt64;
  if (target.scalar_type() == ScalarType::Byte) type = LabelType::kUint8;
  if (target.scalar_type() == ScalarType::Int) type = LabelType::kInt32;
  return {target.const_data_ptr(), type, ignore_index};
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

std::tuple<Tensor, Tensor> upsample_argmax(const Tensor& logits, int64_t height, int64_t width,
                                           bool align_corners, bool return_prob) {
  const Launch launch(logits);
  const bool narrow = logits.size(1) <= 256;
  const std::vector<int64_t> shape = {logits.size(0), height, width};
  Tensor labels = empty(logits, shape, narrow ? ScalarType::Byte : ScalarType::Long);
  return with_compute_type(logits, [&](auto type) {
    using T = decltype(type);
    Tensor prob = empty(logits, return_prob ? shape : std::vector<int64_t>{0}, scalar_type<T>());
    const Logits<T> map = describe<T>(logits, height, width, align_corners);
    launch_argmax(launch, map, tiles_of(map), narrow ? write<uint8_t>(labels) : nullptr,
                  narrow ? nullptr : write<int64_t>(labels),
                  return_prob ? write<T>(prob) : nullptr);
    return std::make_tuple(labels, prob);
  });
}

// (matrix, count of bad labels)
std::tuple<Tensor, Tensor> upsample_confusion(const Tensor& logits, const Tensor& target_any,
                                              int64_t ignore_index, bool align_corners) {
  const Launch launch(logits);
  const Tensor target = torch::stable::contiguous(target_any);
  const std::vector<int64_t> square = {logits.size(1), logits.size(1)};
  Tensor matrix = torch::stable::new_zeros(logits, square, ScalarType::Long);
  Tensor bad = torch::stable::new_zeros(logits, std::vector<int64_t>{1}, ScalarType::Long);
  with_compute_type(logits, [&](auto type) {
    using T = decltype(type);
    const Logits<T> map = describe<T>(logits, target.size(1), target.size(2), align_corners);
    // A large table leaves room for one block on a multiprocessor; more blocks would wait for it.
    const int64_t resident = launch.attribute(cudaDevAttrMultiProcessorCount) * 8;
    launch_confusion(launch, map, tiles_of(map), describe_labels(target, ignore_index),
                     launch.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), resident,
                     write<unsigned long long>(matrix), write<unsigned long long>(bad));
  });
  return {matrix, bad};
}

template <typename A>
Accumulator<A> describe_accumulator(Tensor& to) {
  return {write<A>(to), to.stride(0), to.stride(1), to.stride(2), to.stride(3)};
}

void upsample_softmax_add(Tensor accumulator, const Tensor& logits, bool flip, bool align_corners) {
  const Launch launch(logits);
  with_compute_type(logits, [&](auto type) {
    using T = decltype(type);
    const Logits<T> map =
        describe<T>(logits, accumulator.size(2), accumulator.size(3), align_corners);
    if (accumulator.scalar_type() == ScalarType::Double) {
      launch_softmax_add(launch, map, tiles_of(map), describe_accumulator<double>(accumulator),
                         flip);
    } else {
      launch_softmax_add(launch, map, tiles_of(map), describe_accumulator<float>(accumulator),
                         flip);
    }
  });
}

struct CrossEntropyOptions {
  const std::optional<Tensor>& weight;
  int64_t ignore_index;
  double label_smoothing;
  std::string_view reduction;
  bool align_corners;
};

struct CrossEntropyResult {
  Tensor loss;
  Tensor grad;
  Tensor bad;
};

// `upstream` is the gradient of the loss, or null for one: a scalar, or for reduction none a value
// for each pixel. The gradient of the logits has the type `grad_type`; none computes no gradient.
CrossEntropyResult cross_entropy(const Tensor& logits, const Tensor& target_any,
                                 const CrossEntropyOptions& options,
                                 std::optional<ScalarType> grad_type, const Tensor* upstream_any) {
  const Launch launch(logits);
  return with_compute_type(logits, [&](auto type) {
    using T = decltype(type);
    constexpr ScalarType kType = scalar_type<T>();
    const bool none = options.reduction == "none";
    const Tensor target = torch::stable::contiguous(target_any);
    const Logits<T> map =
        describe<T>(logits, target.size(1), target.size(2), options.align_corners);
    const CellPlan plan =
        plan_cells(map.images, map.classes, map.rows, map.columns, grad_type.has_value());

    CrossEntropy<T> op{};
    op.labels = describe_labels(target, options.ignore_index);
    op.smoothing = static_cast<T>(options.label_smoothing);
    Tensor weight, weight_sum, upstream, partial;
    if (options.weight.has_value()) {
      weight = torch::stable::contiguous(torch::stable::to(*options.weight, kType));
      weight_sum = torch::stable::sum(weight);
      op.class_weights = read<T>(weight);
      op.weight_sum = read<T>(weight_sum);
    }
    if (upstream_any != nullptr) {
      upstream = torch::stable::contiguous(torch::stable::to(*upstream_any, kType));
    }
    const bool per_pixel = none && !grad_type.has_value();
    CrossEntropyResult result;
    result.loss = per_pixel ? empty(logits, {target.size(0), target.size(1), target.size(2)}, kType)
                            : empty(logits, {}, kType);
    result.bad = empty(logits, {1}, ScalarType::Long);
    if (per_pixel) op.pixel_loss = write<T>(result.loss);
    if (none && upstream_any != nullptr) op.pixel_grad = read<T>(upstream);
    const int64_t sum_values = static_cast<int64_t>(sizeof(BlockSums) / sizeof(double));
    Tensor sums = empty(logits, {plan.blocks * sum_values}, ScalarType::Double);
    op.sums = write<BlockSums>(sums);
    if (grad_type.has_value()) {
      partial = empty(logits, {partial_size(plan, map.images, map.classes, map.rows, map.columns)},
                      kType);
      op.partial = write<T>(partial);
    }
    launch_cross_entropy(launch, map, plan, op);

    Tensor scale = empty(logits, {1}, kType);
    launch_finish(launch, op.sums, plan, options.reduction == "mean",
                  !none && upstream_any != nullptr ? read<T>(upstream) : nullptr,
                  per_pixel ? nullptr : write<T>(result.loss), write<T>(scale),
                  write<int64_t>(result.bad));
    if (grad_type.has_value()) {
      result.grad = empty(logits, {logits.size(0), logits.size(1), logits.size(2), logits.size(3)},
                          *grad_type);
      launch_gather(launch, map, plan, read<T>(partial), read<T>(scale), storage_of(result.grad),
                    result.grad.mutable_data_ptr());
    }
    return result;
  });
}

// (loss, count of bad labels)
std::tuple<Tensor, Tensor> upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                                                  const std::optional<Tensor>& weight,
                                                  int64_t ignore_index, double label_smoothing,
                                                  std::string_view reduction, bool align_corners) {
  const CrossEntropyResult result = cross_entropy(
      logits, target, {weight, ignore_index, label_smoothing, reduction, align_corners},
      std::nullopt, nullptr);
  return {result.loss, result.bad};
}

// (loss, gradient in the type of the loss, count of bad labels)
std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_with_grad(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t ignore_index, double label_smoothing, std::string_view reduction, bool align_corners) {
  const ScalarType type =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const CrossEntropyResult result = cross_entropy(
      logits, target, {weight, ignore_index, label_smoothing, reduction, align_corners}, type,
      nullptr);
  return {result.loss, result.grad, result.bad};
}

// (gradient in the type of the logits, count of bad labels)
std::tuple<Tensor, Tensor> upsample_cross_entropy_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& target,
    const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing,
    std::string_view reduction, bool align_corners) {
  const CrossEntropyResult result = cross_entropy(
      logits, target, {weight, ignore_index, label_smoothing, reduction, align_corners},
      logits.scalar_type(), &grad);
  return {result.grad, result.bad};
}

}  // namespace

}  // namespace deeplab_fast::cuda

#define DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS                                                  \
  "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, " \
  "str reduction, bool align_corners"

STABLE_TORCH_LIBRARY_FRAGMENT(deeplab_fast, m) {
  m.def(
      "_upsample_argmax_cuda(Tensor logits, int height, int width, bool align_corners, "
      "bool return_prob) -> (Tensor, Tensor)");
  m.def(
      "_upsample_confusion_cuda(Tensor logits, Tensor target, int ignore_index, "
      "bool align_corners) -> (Tensor, Tensor)");
  m.def(
      "_upsample_softmax_add_cuda(Tensor(a!) accumulator, Tensor logits, bool flip, "
      "bool align_corners) -> ()");
  m.def("_upsample_cross_entropy_cuda(" DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS ") -> (Tensor, Tensor)");
  m.def("_upsample_cross_entropy_with_grad_cuda(" DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS
        ") -> (Tensor, Tensor, Tensor)");
  m.def("_upsample_cross_entropy_backward_cuda(Tensor grad, " DEEPLAB_FAST_CROSS_ENTROPY_OPTIONS
        ") -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(deeplab_fast, CUDA, m) {
  namespace cuda = deeplab_fast::cuda;
  m.impl("_upsample_argmax_cuda", TORCH_BOX(&cuda::upsample_argmax));
  m.impl("_upsample_confusion_cuda", TORCH_BOX(&cuda::upsample_confusion));
  m.impl("_upsample_softmax_add_cuda", TORCH_BOX(&cuda::upsample_softmax_add));
  m.impl("_upsample_cross_entropy_cuda", TORCH_BOX(&cuda::upsample_cross_entropy));
  m.impl("_upsample_cross_entropy_with_grad_cuda",
         TORCH_BOX(&cuda::upsample_cross_entropy_with_grad));
  m.impl("_upsample_cross_entropy_backward_cuda",
         TORCH_BOX(&cuda::upsample_cross_entropy_backward));
}

#endif  // DEEPLAB_FAST_WITHOUT_TORCH
