// The upsampling ops on CPU tensors: packs the logits, cuts the work into bands, runs the kernels
// of the processor's instruction set in threads, and sums their partial results in a fixed order.
//
// Gradients of cross entropy: each band writes what it gives to its two source rows to a place of
// its own, so that the result does not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "deeplab_fast/bilinear.h"
#include "deeplab_fast/upsample_cpu.h"
#include "instruction_sets.h"

namespace deeplab_fast::cpu {

using at::Tensor;

namespace {

// Interpolated class values that are worth a thread: 13 microseconds of argmax.
constexpr int64_t kGrain = 1 << 16;
// Confusion matrices are kept for each thread up to this size in total.
constexpr int64_t kMatrixBytes = int64_t{64} << 20;

const InstructionSet* named_set(const std::string& name) {
  for (const InstructionSet* set : {&avx512(), &avx2(), &baseline()}) {
    if (name == set->name) {
      TORCH_CHECK_VALUE(set->supported(), "instruction set ", name,
                        ": this processor does not have it, or it was not compiled");
      return set;
    }
  }
  TORCH_CHECK_VALUE(false, "no instruction set is named '", name,
                    "'; allowed: baseline, avx2, avx512");
}

const InstructionSet* environment_set() {
  const char* name = std::getenv("DEEPLAB_FAST_CPU_SET");
  return name != nullptr && *name != '\0' ? named_set(name) : nullptr;
}

const InstructionSet* automatic_set() {
  for (const InstructionSet* set : {&avx512(), &avx2()}) {
    if (set->automatic && set->supported()) return set;
  }
  return &baseline();
}

// Ops read them while another thread may change them.
struct Sets {
  std::atomic<const InstructionSet*> fixed;  // null for none
  std::atomic<const InstructionSet*> automatic[kNumFamilies];
};

Sets& sets() {
  static Sets all = {environment_set(), {automatic_set(), automatic_set(), automatic_set()}};
  return all;
}

const InstructionSet& current_set(Family family) {
  const InstructionSet* const fixed = sets().fixed;
  return fixed != nullptr ? *fixed : *sets().automatic[family];
}

template <typename T>
const Kernels<T>& current_kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return current_set(kUpsampling).double_precision;
  } else {
    return current_set(kUpsampling).single_precision;
  }
}

int checked_size(int64_t size, int64_t least = 1) {
  TORCH_CHECK_VALUE(size >= least && size <= std::numeric_limits<int>::max() / 2, "a size of ",
                    size, " is not from ", least, " to 2^30 - 1");
  return static_cast<int>(size);
}

void check_map(const char* name, const Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 4 && at::isFloatingType(map.scalar_type()), name,
                    " must be a map [N, C, H, W] of floating-point numbers, got ",
                    map.scalar_type(), " ", map.sizes());
}

void check_target(const Tensor& target, const Tensor& logits) {
  const at::ScalarType type = target.scalar_type();
  check_map("logits", logits);
  TORCH_CHECK_VALUE((type == at::kByte || type == at::kInt || type == at::kLong) &&
                        target.device().is_cpu() && target.dim() == 3 &&
                        target.size(0) == logits.size(0),
                    "target must be labels [N, H, W] in uint8, int32 or int64 for logits ",
                    logits.sizes(), ", got ", type, " ", target.sizes());
}

// A `Problem` and the memory that it points to.
template <typename T>
class Plan {
 public:
  Plan(const Tensor& logits, int64_t out_height, int64_t out_width, bool align_corners,
       bool mirrored = false)
      : kernels(current_kernels<T>()) {
    check_map("logits", logits);
    problem.images = checked_size(logits.size(0), 0);
    problem.classes = checked_size(logits.size(1));
    problem.height = checked_size(logits.size(2));
    problem.width = checked_size(logits.size(3));
    problem.out_height = checked_size(out_height);
    problem.out_width = checked_size(out_width);
    pack(logits);
    cut_rows(align_corners);
    cut_columns(align_corners, mirrored);
  }

  int64_t units() const { return static_cast<int64_t>(problem.images) * problem.num_bands; }

  int64_t source_row_size() const { return static_cast<int64_t>(problem.classes) * problem.width; }

  template <typename Function>
  void for_units(const Function& function) const {
    const int64_t values = static_cast<int64_t>(problem.images) * problem.out_height *
                           problem.out_width * problem.classes;
    const int64_t each = std::max<int64_t>(1, values / std::max<int64_t>(1, units()));
    at::parallel_for(0, units(), std::max<int64_t>(1, kGrain / each), function);
  }

  const Kernels<T>& kernels;
  Problem<T> problem{};
  std::vector<Band> bands;

 private:
  // Copies the logits to [images][height][classes][width] in T. A strided copy of PyTorch's took
  // five times as long for channels_last.
  void pack(const Tensor& logits_any) {
    const Tensor logits = logits_any.to(c10::CppTypeToScalarType<T>::value);
    const int64_t size = source_row_size();
    const int64_t rows = static_cast<int64_t>(problem.images) * problem.height;
    source_.resize(rows * size + kSourceSlack);
    const T* const from = logits.const_data_ptr<T>();
    const int64_t class_stride = logits.stride(1), column_stride = logits.stride(3);
    const int classes = problem.classes, width = problem.width;
    std::atomic<bool> finite{true};
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
      // x - x is 0 for finite x, else nan.
      T difference = 0;
      for (int64_t i = begin; i < end; ++i) {
        const T* const row =
            from + i / problem.height * logits.stride(0) + i % problem.height * logits.stride(2);
        T* to = source_.data() + i * size;
        for (int c = 0; c < classes; ++c, to += width) {
          const T* const line = row + c * class_stride;
          for (int x = 0; x < width; ++x) to[x] = line[x * column_stride];
        }
        for (const T* x = to - size; x < to; ++x) difference += *x - *x;
      }
      if (difference != 0) finite = false;
    });
    problem.source = source_.data();
    problem.finite = finite;
  }

  void cut_rows(bool align_corners) {
    const Axis<T> axis = make_axis<T>(problem.height, problem.out_height, align_corners);
    for (int y = 0, row = 0; y < problem.height; ++y) {
      const int end = first_output(axis, y + 1);
      for (; row < end; row = bands.back().row_end) {
        bands.push_back({y, row, std::min(row + kBandRows, end)});
      }
    }
    problem.bands = bands.data();
    problem.num_bands = static_cast<int>(bands.size());
    for (int i = 0; i < problem.out_height; ++i) {
      row_weights_.push_back(source_tap(axis, i).weight);
    }
    problem.row_weights = row_weights_.data();
  }

  void cut_columns(bool align_corners, bool mirrored) {
    const Axis<T> axis = make_axis<T>(problem.width, problem.out_width, align_corners);
    const int lanes = kernels.lanes;
    problem.blocks = (problem.out_width + lanes - 1) / lanes;
    for (int b = 0; b < problem.blocks; ++b) {
      int first = problem.width, last = 0;
      for (int i = 0; i < lanes; ++i) {
        const int column = std::min(b * lanes + i, problem.out_width - 1);
        const Tap<T> tap = source_tap(axis, mirrored ? problem.out_width - 1 - column : column);
        lo_.push_back(tap.lo);
        hi_.push_back(tap.hi);
        column_weights_.push_back(tap.weight);
        first = std::min(first, tap.lo);
        last = std::max(last, tap.hi);
      }
      for (int i = b * lanes; i < (b + 1) * lanes; ++i) {
        lo_[i] -= first;
        hi_[i] -= first;
      }
      base_.push_back(first);
      count_.push_back(last - first + 1);
    }
    problem.base = base_.data();
    problem.count = count_.data();
    problem.lo = lo_.data();
    problem.hi = hi_.data();
    problem.column_weights = column_weights_.data();
  }

  std::vector<T> source_, row_weights_, column_weights_;
  std::vector<int32_t> base_, count_, lo_, hi_;
};

// Calls function(T{}) with the type that logits are computed in.
template <typename Function>
auto with_compute_type(const Tensor& logits, const Function& function) {
  return logits.scalar_type() == at::kDouble ? function(double{}) : function(float{});
}

at::ScalarType compute_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Labels labels_of(const Tensor& target, int64_t ignore_index) {
  LabelType type = LabelType::kInt64;
  if (target.scalar_type() == at::kByte) type = LabelType::kUint8;
  if (target.scalar_type() == at::kInt) type = LabelType::kInt32;
  return {target.const_data_ptr(), type, ignore_index};
}

// As deeplab_fast.reference.check_labels: raises for labels that are neither ignored nor a class.
void check_labels(const std::vector<LabelCounts>& counts, const Tensor& target, int64_t classes,
                  int64_t ignore_index) {
  int64_t bad = 0;
  int64_t first = -1;
  for (const LabelCounts& unit : counts) {
    if (unit.bad > 0 && (first < 0 || unit.first_bad < first)) first = unit.first_bad;
    bad += unit.bad;
  }
  if (bad == 0) return;
  const int64_t column = first % target.size(2);
  const int64_t row = first / target.size(2) % target.size(1);
  const int64_t image = first / target.size(2) / target.size(1);
  TORCH_CHECK_VALUE(false, "label ", target[image][row][column].item<int64_t>(), " at (image ",
                    image, ", row ", row, ", column ", column, ") is outside [0, ", classes,
                    ") and is not ignore_index=", ignore_index, "; ", bad,
                    " in all. Map the labels to class indices, or set ignore_index");
}

// Sums what the units gave to their source rows, bands of a row in their order, times `scale`.
template <typename T>
Tensor gather_gradient(const Plan<T>& plan, const std::vector<T>& partial, T scale,
                       const Tensor& logits) {
  const Problem<T>& problem = plan.problem;
  Tensor grad = at::empty(
      logits.sizes(),
      logits.options().dtype(compute_dtype(logits)).memory_format(at::MemoryFormat::Contiguous));
  T* const out = grad.data_ptr<T>();
  std::vector<int> first_band(problem.height + 1, problem.num_bands);
  for (int b = problem.num_bands - 1; b >= 0; --b) first_band[plan.bands[b].source_row] = b;
  for (int y = problem.height - 1; y >= 0; --y) {
    first_band[y] = std::min(first_band[y], first_band[y + 1]);
  }

  const int64_t size = plan.source_row_size();
  const int64_t rows = static_cast<int64_t>(problem.images) * problem.height;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    std::vector<T> sum(size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / problem.height;
      const int y = static_cast<int>(i % problem.height);
      std::fill(sum.begin(), sum.end(), T(0));
      const auto add = [&](int source_row, int part) {
        for (int b = first_band[source_row]; b < first_band[source_row + 1]; ++b) {
          const T* from = partial.data() + (2 * (image * problem.num_bands + b) + part) * size;
          for (int64_t k = 0; k < size; ++k) sum[k] += from[k];
        }
      };
      if (y > 0) add(y - 1, 1);
      add(y, 0);
      // Behind the last source row both taps fall on it.
      if (y == problem.height - 1) add(y, 1);
      for (int64_t c = 0; c < problem.classes; ++c) {
        T* const row = out + ((image * problem.classes + c) * problem.height + y) * problem.width;
        for (int x = 0; x < problem.width; ++x) row[x] = scale * sum[c * problem.width + x];
      }
    }
  });
  return grad;
}

struct CrossEntropyOptions {
  const std::optional<Tensor>& weight;
  int64_t ignore_index;
  double label_smoothing;
  std::string_view reduction;
  bool align_corners;
};

// (loss, gradient); the gradient is empty without `with_grad`. `pixel_grad` is what each pixel's
// loss is multiplied with in the gradient, for reduction none.
template <typename T>
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target_any,
                                         const CrossEntropyOptions& options, bool with_grad,
                                         const Tensor* pixel_grad) {
  check_target(target_any, logits);
  const Tensor target = target_any.contiguous();
  Plan<T> plan(logits, target.size(1), target.size(2), options.align_corners);
  const at::TensorOptions dtype = logits.options().dtype(compute_dtype(logits));
  const bool none = options.reduction == "none";
  TORCH_CHECK_VALUE(none || options.reduction == "mean" || options.reduction == "sum",
                    "reduction must be mean, sum or none, got ", options.reduction);

  CrossEntropy<T> op{};
  op.labels = labels_of(target, options.ignore_index);
  std::vector<LabelCounts> counts(plan.units());
  std::vector<double> unit_loss(plan.units()), unit_weight(plan.units());
  op.counts = counts.data();
  op.loss = unit_loss.data();
  op.weight = unit_weight.data();
  op.smoothing = static_cast<T>(options.label_smoothing);
  op.weight_sum = static_cast<T>(plan.problem.classes);
  Tensor weight;
  if (options.weight.has_value()) {
    TORCH_CHECK_VALUE(options.weight->dim() == 1 && options.weight->size(0) == logits.size(1) &&
                          options.weight->device().is_cpu(),
                      "weight must be one number for each of the ", logits.size(1),
                      " classes, got ", options.weight->sizes());
    weight = options.weight->to(dtype.dtype()).contiguous();
    op.class_weights = weight.const_data_ptr<T>();
    op.weight_sum = static_cast<T>(weight.sum(at::kDouble).template item<double>());
  }
  Tensor loss;
  if (none && pixel_grad == nullptr) {
    loss = at::empty(target.sizes(), dtype.memory_format(at::MemoryFormat::Contiguous));
    op.pixel_loss = loss.data_ptr<T>();
  }
  Tensor pixel_factor;
  if (pixel_grad != nullptr) {
    TORCH_CHECK_VALUE(pixel_grad->sizes() == target.sizes() && pixel_grad->device().is_cpu(),
                      "grad ", pixel_grad->sizes(), " does not fit target ", target.sizes());
    pixel_factor = pixel_grad->to(dtype.dtype()).contiguous();
    op.pixel_grad = pixel_factor.const_data_ptr<T>();
  }
  std::vector<T> partial;
  if (with_grad) {
    partial.resize(2 * plan.units() * plan.source_row_size());
    op.partial = partial.data();
  }

  plan.for_units([&](int64_t begin, int64_t end) {
    plan.kernels.cross_entropy(plan.problem, op, begin, end);
  });
  check_labels(counts, target, plan.problem.classes, options.ignore_index);

  double loss_sum = 0, weight_sum = 0;
  int64_t valid = 0;
  for (int64_t u = 0; u < plan.units(); ++u) {
    loss_sum += unit_loss[u];
    weight_sum += unit_weight[u];
    valid += counts[u].valid;
  }
  double scale = 1;
  if (options.reduction == "mean") {
    loss_sum /= weight_sum;
    // Without a pixel that counts the mean is nan and its gradient 0, as in PyTorch.
    scale = valid > 0 ? 1 / weight_sum : 0;
  }
  if (!loss.defined()) loss = at::scalar_tensor(loss_sum, dtype);
  Tensor grad;
  if (with_grad) grad = gather_gradient(plan, partial, static_cast<T>(scale), logits);
  return {loss, grad};
}

}  // namespace

const char* current_set_name(Family family) { return current_set(family).name; }

std::string instruction_set(std::string name) {
  if (!name.empty()) sets().fixed = name == "auto" ? environment_set() : named_set(name);
  return current_set_name(kConvolutions);
}

std::string suggest_set(std::string family, std::string name) {
  for (const Family each : {kConvolutions, kUpsampling, kBatchNorm}) {
    if (family != kFamilies[each]) continue;
    if (!name.empty()) sets().automatic[each] = named_set(name);
    return current_set_name(each);
  }
  TORCH_CHECK_VALUE(false, "no family of kernels is named '", family,
                    "'; allowed: convolutions, upsampling, batch_norm");
}

std::tuple<Tensor, Tensor> upsample_argmax(const Tensor& logits, int64_t height, int64_t width,
                                           bool align_corners, bool return_prob) {
  check_map("logits", logits);
  const bool narrow = logits.size(1) <= 256;
  const at::TensorOptions options = logits.options().memory_format(at::MemoryFormat::Contiguous);
  const std::vector<int64_t> shape = {logits.size(0), height, width};
  Tensor labels = at::empty(shape, options.dtype(narrow ? at::kByte : at::kLong));
  Tensor prob = at::empty(return_prob ? shape : std::vector<int64_t>{0},
                          options.dtype(compute_dtype(logits)));
  with_compute_type(logits, [&](auto type) {
    using T = decltype(type);
    Plan<T> plan(logits, height, width, align_corners);
    const ArgmaxResult<T> result = {narrow ? labels.data_ptr<uint8_t>() : nullptr,
                                    narrow ? nullptr : labels.data_ptr<int64_t>(),
                                    return_prob ? prob.data_ptr<T>() : nullptr};
    plan.for_units(
        [&](int64_t begin, int64_t end) { plan.kernels.argmax(plan.problem, result, begin, end); });
  });
  return {labels, prob};
}

Tensor upsample_cross_entropy(const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& weight, int64_t ignore_index,
                              double label_smoothing, std::string_view reduction,
                              bool align_corners) {
  return with_compute_type(logits, [&](auto type) {
    return std::get<0>(cross_entropy<decltype(type)>(
        logits, target, {weight, ignore_index, label_smoothing, reduction, align_corners}, false,
        nullptr));
  });
}

std::tuple<Tensor, Tensor> upsample_cross_entropy_with_grad(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t ignore_index, double label_smoothing, std::string_view reduction, bool align_corners) {
  return with_compute_type(logits, [&](auto type) {
    return cross_entropy<decltype(type)>(
        logits, target, {weight, ignore_index, label_smoothing, reduction, align_corners}, true,
        nullptr);
  });
}

Tensor upsample_cross_entropy_backward(const Tensor& grad, const Tensor& logits,
                                       const Tensor& target, const std::optional<Tensor>& weight,
                                       int64_t ignore_index, double label_smoothing,
                                       std::string_view reduction, bool align_corners) {
  return with_compute_type(logits, [&](auto type) {
    const bool none = reduction == "none";
    Tensor result = std::get<1>(cross_entropy<decltype(type)>(
        logits, target, {weight, ignore_index, label_smoothing, reduction, align_corners}, true,
        none ? &grad : nullptr));
    TORCH_CHECK_VALUE(none || grad.numel() == 1, "grad must be one number, got ", grad.sizes());
    if (!none) result = result.mul(grad.to(result.scalar_type()));
    return result.to(logits.scalar_type());
  });
}

Tensor upsample_confusion(const Tensor& logits, const Tensor& target_any, int64_t ignore_index,
                          bool align_corners) {
  check_target(target_any, logits);
  const Tensor target = target_any.contiguous();
  const int64_t classes = checked_size(logits.size(1));
  return with_compute_type(logits, [&](auto type) {
    using T = decltype(type);
    Plan<T> plan(logits, target.size(1), target.size(2), align_corners);
    const int64_t parts = std::clamp<int64_t>(
        kMatrixBytes / (classes * classes) / static_cast<int64_t>(sizeof(int64_t)), 1,
        std::max(1, at::get_num_threads()));
    Tensor matrices = at::zeros({parts, classes, classes}, logits.options().dtype(at::kLong));
    std::vector<LabelCounts> counts(plan.units());
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const Confusion op = {labels_of(target, ignore_index), counts.data(),
                              matrices.data_ptr<int64_t>() + part * classes * classes};
        plan.kernels.confusion(plan.problem, op, plan.units() * part / parts,
                               plan.units() * (part + 1) / parts);
      }
    });
    check_labels(counts, target, classes, ignore_index);
    return parts == 1 ? matrices[0] : matrices.sum(0);
  });
}

void upsample_softmax_add(const Tensor& accumulator, const Tensor& logits, bool flip,
                          bool align_corners) {
  check_map("logits", logits);
  const at::ScalarType dtype = accumulator.scalar_type();
  TORCH_CHECK_VALUE(accumulator.dim() == 4 && (dtype == at::kFloat || dtype == at::kDouble) &&
                        accumulator.size(0) == logits.size(0) &&
                        accumulator.size(1) == logits.size(1),
                    "accumulator must be float32 or float64 [N, C, H, W] for logits ",
                    logits.sizes(), ", got ", dtype, " ", accumulator.sizes());
  with_compute_type(logits, [&](auto type) {
    using T = decltype(type);
    Plan<T> plan(logits, accumulator.size(2), accumulator.size(3), align_corners, flip);
    const Accumulator to = {accumulator.data_ptr(), accumulator.scalar_type() == at::kDouble,
                            accumulator.stride(0),  accumulator.stride(1),
                            accumulator.stride(2),  accumulator.stride(3)};
    plan.for_units([&](int64_t begin, int64_t end) {
      plan.kernels.softmax_add(plan.problem, to, begin, end);
    });
  });
}

namespace {

Tensor elementwise(const Tensor& x, bool logarithm) {
  const Tensor from = x.contiguous();
  Tensor to = at::empty_like(from);
  with_compute_type(x, [&](auto type) {
    using T = decltype(type);
    const Kernels<T>& kernels = current_kernels<T>();
    (logarithm ? kernels.log : kernels.exp)(from.const_data_ptr<T>(), to.data_ptr<T>(),
                                            from.numel());
  });
  return to;
}

}  // namespace

Tensor exp_nonpositive(const Tensor& x) { return elementwise(x, false); }

Tensor log_from_one(const Tensor& x) { return elementwise(x, true); }

namespace {

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> axis_tables(int64_t in, int64_t out,
                                                       bool align_corners) {
  const Axis<T> axis = make_axis<T>(checked_size(in), checked_size(out), align_corners);
  Tensor lo = at::empty({out}, at::kInt), hi = at::empty({out}, at::kInt);
  Tensor weight = at::empty({out}, c10::CppTypeToScalarType<T>::value);
  for (int i = 0; i < axis.out; ++i) {
    const Tap<T> tap = source_tap(axis, i);
    lo.data_ptr<int>()[i] = tap.lo;
    hi.data_ptr<int>()[i] = tap.hi;
    weight.data_ptr<T>()[i] = tap.weight;
  }
  Tensor first = at::empty({in + 1}, at::kInt);
  for (int i = 0; i <= axis.in; ++i) first.data_ptr<int>()[i] = first_output(axis, i);
  return {lo, hi, weight, first};
}

}  // namespace

// (lo, hi, weight of hi) of every output index, and first_output of every source index and `in`.
std::tuple<Tensor, Tensor, Tensor, Tensor> bilinear_axis(int64_t in, int64_t out,
                                                         bool align_corners, bool is_double) {
  return is_double ? axis_tables<double>(in, out, align_corners)
                   : axis_tables<float>(in, out, align_corners);
}

}  // namespace deeplab_fast::cpu
