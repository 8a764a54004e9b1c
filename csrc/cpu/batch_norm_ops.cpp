// The batch norm kernels on CPU tensors: checks, threads, memory. deeplab_fast/ops/batch_norm.py
// says what the ops compute.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "deeplab_fast/batch_norm_cpu.h"
#include "instruction_sets.h"

namespace deeplab_fast::cpu {

using at::Tensor;

namespace {

// Values that are worth a thread in a pass that keeps no sums.
constexpr int64_t kGrain = 1 << 15;

const BatchNormKernels& current_batch_norm_kernels() {
  const std::string_view name = current_set_name(kBatchNorm);
  for (const BatchNormKernels* kernels : {&batch_norm_avx512(), &batch_norm_avx2()}) {
    if (name == kernels->name) return *kernels;
  }
  return batch_norm_baseline();
}

template <typename T>
const BatchNormFunctions<T>& current_functions() {
  if constexpr (std::is_same_v<T, double>) {
    return current_batch_norm_kernels().double_precision;
  } else {
    return current_batch_norm_kernels().single_precision;
  }
}

// function(T{}) with the type of x's values.
template <typename Function>
auto by_dtype(const Tensor& x, const Function& function) {
  return x.scalar_type() == at::kDouble ? function(double{}) : function(float{});
}

// NaN where it is infinite, see deeplab_fast/reference.py.
template <typename T>
T factor(T rstd, T weight) {
  const T scale = rstd * weight;
  return scale + (scale - scale);
}

// x in channels_last.
Tensor prepared_x(const Tensor& x) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) &&
          x.size(1) > 0,
      "x must be a float32 or float64 map [N, C, H, W], got ", x.scalar_type(), " ", x.sizes());
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

// Another map of the shape and dtype of x, in channels_last.
Tensor prepared_map(const char* name, const Tensor& map, const Tensor& x) {
  TORCH_CHECK_VALUE(map.sizes() == x.sizes() && map.scalar_type() == x.scalar_type() &&
                        map.device() == x.device(),
                    name, " must be a map like x, ", x.scalar_type(), " ", x.sizes(), ", got ",
                    map.scalar_type(), " ", map.sizes());
  return map.contiguous(at::MemoryFormat::ChannelsLast);
}

std::optional<Tensor> prepared_map(const char* name, const std::optional<Tensor>& map,
                                   const Tensor& x) {
  if (!map.has_value()) return std::nullopt;
  return prepared_map(name, *map, x);
}

// A value for each channel, in the dtype of x. What is converted lives as long as this does.
template <typename T>
class Vector {
 public:
  Vector(const char* name, const Tensor& vector, const Tensor& x) : kept_(vector) {
    TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == x.size(1) &&
                          at::isFloatingType(vector.scalar_type()) && vector.device() == x.device(),
                      name, " must be a vector of ", x.size(1), " numbers, got ",
                      vector.scalar_type(), " ", vector.sizes());
    if (vector.scalar_type() != x.scalar_type()) kept_ = kept_.to(x.scalar_type());
    kept_ = kept_.contiguous();
    data_ = kept_.const_data_ptr<T>();
  }
  T operator[](int64_t channel) const { return data_[channel]; }
  const T* data() const { return data_; }

 private:
  Tensor kept_;
  const T* data_;
};

template <typename T>
T* running_vector(const char* name, const Tensor& vector, const Tensor& x) {
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == x.size(1) && vector.is_contiguous() &&
                        vector.scalar_type() == x.scalar_type() && vector.device() == x.device(),
                    name, " must be contiguous ", x.scalar_type(), " [", x.size(1), "], got ",
                    vector.scalar_type(), " ", vector.sizes());
  return vector.data_ptr<T>();
}

Activation checked_activation(std::optional<std::string_view> name, bool only_from_x) {
  if (!name.has_value()) return Activation::kNone;
  const std::string_view act = *name;
  if (act == "relu") return Activation::kRelu;
  if (act == "relu6") return Activation::kRelu6;
  TORCH_CHECK_VALUE(act == "hardswish", "act must be relu, relu6 or hardswish, got ", act);
  TORCH_CHECK_VALUE(only_from_x, "hardswish takes no residual and no out");
  return Activation::kHardswish;
}

Tensor empty_map(const Tensor& x) {
  return at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
}

MapCut cut_map(const Tensor& x) { return MapCut(x.size(0) * x.size(2) * x.size(3), x.size(1)); }

// Vectors per channel, repeated over the pixels of a row.
template <typename T>
class RowVectors {
 public:
  RowVectors(const MapCut& cut, int count)
      : channels_(cut.channels),
        width_(std::max(cut.width(), kMinWidth)),
        values_(new T[count * width_]) {}

  template <typename Value>
  const T* add(const Value& value) {
    T* const to = values_.get() + used_++ * width_;
    for (int64_t c = 0; c < channels_; ++c) to[c] = value(c);
    for (int64_t i = channels_; i < width_; ++i) to[i] = to[i - channels_];
    return to;
  }

 private:
  int64_t channels_, width_, used_ = 0;
  std::unique_ptr<T[]> values_;
};

// function(piece) over the whole map, in threads where they pay.
template <typename Function>
void for_rows(const MapCut& cut, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, kGrain / cut.width());
  at::parallel_for(0, cut.rows, grain,
                   [&](int64_t begin, int64_t end) { function(cut.some(begin, end)); });
  if (cut.rest != 0) function(cut.last());
}

// What function(piece, scratch, to) writes for each piece: [pieces][2][channels].
template <typename T, typename Function>
std::unique_ptr<double[]> sums_of_pieces(const MapCut& cut, const Function& function) {
  std::unique_ptr<double[]> parts(new double[cut.pieces() * 2 * cut.channels]);
  at::parallel_for(0, cut.pieces(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[batch_norm_scratch(cut.width())]);
    for (int64_t i = begin; i < end; ++i) {
      function(cut.unit(i), scratch.get(), parts.get() + 2 * i * cut.channels);
    }
  });
  return parts;
}

template <typename Function>
void for_channels(const MapCut& cut, const Function& function) {
  at::parallel_for(0, cut.channels, std::max<int64_t>(1, kGrain / cut.pieces()), function);
}

// Counts the batch; the momentum as nn.BatchNorm2d takes it, where none is given 1 / batches.
double counted_momentum(const std::optional<Tensor>& num_batches_tracked,
                        std::optional<double> momentum) {
  if (!num_batches_tracked.has_value()) return momentum.value_or(0.0);
  TORCH_CHECK_VALUE(num_batches_tracked->numel() == 1 &&
                        num_batches_tracked->scalar_type() == at::kLong &&
                        num_batches_tracked->device().is_cpu(),
                    "num_batches_tracked must be one int64 on the CPU, got ",
                    num_batches_tracked->scalar_type(), " ", num_batches_tracked->sizes());
  const int64_t batches = ++*num_batches_tracked->data_ptr<int64_t>();
  return momentum.value_or(1.0 / static_cast<double>(batches));
}

// The maps and vectors of a backward pass, prepared.
template <typename T>
struct Given {
  Tensor grad, x;
  std::optional<Tensor> out;
  Vector<T> mean, rstd, weight, bias;

  Backward<T> arguments(std::optional<std::string_view> act, RowVectors<T>& vectors) const {
    Backward<T> b{};
    b.act = checked_activation(act, !out.has_value());
    b.grad = grad.template const_data_ptr<T>();
    b.x = x.template const_data_ptr<T>();
    b.out = out.has_value() ? out->template const_data_ptr<T>() : nullptr;
    b.mean = vectors.add([&](int64_t c) { return mean[c]; });
    b.scale = vectors.add([&](int64_t c) { return factor(rstd[c], weight[c]); });
    b.bias = vectors.add([&](int64_t c) { return bias[c]; });
    return b;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_stats(const Tensor& map, double eps,
                                               const std::optional<Tensor>& running_mean,
                                               const std::optional<Tensor>& running_var,
                                               const std::optional<Tensor>& num_batches_tracked,
                                               std::optional<double> momentum) {
  const Tensor x = prepared_x(map);
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "give both of running_mean and running_var, or none of them");
  const MapCut cut = cut_map(x);
  Tensor mean = at::empty({x.size(1)}, x.options());
  Tensor variance = at::empty({x.size(1)}, x.options());
  Tensor rstd = at::empty({x.size(1)}, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    T* const means = mean.data_ptr<T>();
    T* const variances = variance.data_ptr<T>();
    T* const rstds = rstd.data_ptr<T>();
    T *running_means = nullptr, *running_vars = nullptr;
    if (running_mean.has_value()) {
      running_means = running_vector<T>("running_mean", *running_mean, x);
      running_vars = running_vector<T>("running_var", *running_var, x);
    }
    if (x.numel() == 0) {
      std::fill_n(means, x.size(1), T(0));
      std::fill_n(variances, x.size(1), T(0));
    } else {
      const BatchNormFunctions<T>& kernels = current_functions<T>();
      const T* const from = x.const_data_ptr<T>();
      const auto parts = sums_of_pieces<T>(cut, [&](const Piece& piece, T* scratch, double* to) {
        kernels.stats(from, piece, scratch, to);
      });
      std::vector<double> counts;
      for (int64_t i = 0; i < cut.pieces(); ++i) {
        const Piece piece = cut.unit(i);
        counts.push_back(static_cast<double>(piece.rows * piece.pixels));
      }
      for_channels(cut, [&](int64_t begin, int64_t end) {
        kernels.combine_stats(parts.get(), counts.data(), cut.pieces(), cut.channels, begin, end,
                              means, variances);
      });
    }
    for (int64_t c = 0; c < x.size(1); ++c) rstds[c] = T(1) / std::sqrt(variances[c] + T(eps));
    if (running_means == nullptr) return;
    const double share = counted_momentum(num_batches_tracked, momentum);
    const double count = static_cast<double>(x.numel() / x.size(1));
    const T unbiased = static_cast<T>(count / std::max(count - 1, 1.0));
    const T now = static_cast<T>(share), kept = static_cast<T>(1 - share);
    for (int64_t c = 0; c < x.size(1); ++c) {
      running_means[c] = std::fma(now, means[c], kept * running_means[c]);
      running_vars[c] = std::fma(now, variances[c] * unbiased, kept * running_vars[c]);
    }
  });
  return {mean, variance, rstd};
}

Tensor bn_act(const Tensor& map, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
              const Tensor& bias, const std::optional<Tensor>& other,
              std::optional<std::string_view> act) {
  const Tensor x = prepared_x(map);
  const std::optional<Tensor> residual = prepared_map("residual", other, x);
  Tensor y = empty_map(x);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Vector<T> means("mean", mean, x), rstds("rstd", rstd, x);
    const Vector<T> weights("weight", weight, x), biases("bias", bias, x);
    const MapCut cut = cut_map(x);
    RowVectors<T> vectors(cut, 3);
    Forward<T> f{};
    f.act = checked_activation(act, !residual.has_value());
    f.x = x.const_data_ptr<T>();
    f.mean = vectors.add([&](int64_t c) { return means[c]; });
    f.scale = vectors.add([&](int64_t c) { return factor(rstds[c], weights[c]); });
    f.bias = vectors.add([&](int64_t c) { return biases[c]; });
    f.residual = residual.has_value() ? residual->const_data_ptr<T>() : nullptr;
    f.y = y.data_ptr<T>();
    const BatchNormFunctions<T>& kernels = current_functions<T>();
    for_rows(cut, [&](const Piece& piece) { kernels.bn_act(f, piece); });
  });
  return y;
}

std::tuple<Tensor, Tensor> bn_act_reduce(const Tensor& grad, const Tensor& map, const Tensor& mean,
                                         const Tensor& rstd, const Tensor& weight,
                                         const Tensor& bias, const std::optional<Tensor>& out,
                                         std::optional<std::string_view> act) {
  const Tensor x = prepared_x(map);
  Tensor sum = at::empty({x.size(1)}, x.options());
  Tensor sum_xhat = at::empty({x.size(1)}, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const MapCut cut = cut_map(x);
    RowVectors<T> vectors(cut, 3);
    const Given<T> given{prepared_map("grad", grad, x),
                         x,
                         prepared_map("out", out, x),
                         {"mean", mean, x},
                         {"rstd", rstd, x},
                         {"weight", weight, x},
                         {"bias", bias, x}};
    const Backward<T> b = given.arguments(act, vectors);
    T* const sums = sum.data_ptr<T>();
    T* const sums_xhat = sum_xhat.data_ptr<T>();
    if (x.numel() == 0) {
      std::fill_n(sums, x.size(1), T(0));
      std::fill_n(sums_xhat, x.size(1), T(0));
      return;
    }
    const BatchNormFunctions<T>& kernels = current_functions<T>();
    const auto parts = sums_of_pieces<T>(cut, [&](const Piece& piece, T* scratch, double* to) {
      kernels.reduce(b, piece, scratch, to);
    });
    for_channels(cut, [&](int64_t begin, int64_t end) {
      kernels.combine_sums(parts.get(), cut.pieces(), cut.channels, begin, end, given.rstd.data(),
                           sums, sums_xhat);
    });
  });
  return {sum, sum_xhat};
}

std::tuple<Tensor, Tensor> bn_act_backward(
    const Tensor& grad, const Tensor& map, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& out,
    const std::optional<Tensor>& mean_grad, const std::optional<Tensor>& mean_grad_xhat,
    std::optional<std::string_view> act, bool to_residual, double count) {
  const Tensor x = prepared_x(map);
  TORCH_CHECK_VALUE(mean_grad.has_value() == mean_grad_xhat.has_value(),
                    "give both of mean_grad and mean_grad_xhat, or none of them");
  Tensor dx = empty_map(x);
  Tensor d_residual = to_residual ? empty_map(x) : at::empty({0}, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const MapCut cut = cut_map(x);
    RowVectors<T> vectors(cut, 5);
    const Given<T> given{prepared_map("grad", grad, x),
                         x,
                         prepared_map("out", out, x),
                         {"mean", mean, x},
                         {"rstd", rstd, x},
                         {"weight", weight, x},
                         {"bias", bias, x}};
    Backward<T> b = given.arguments(act, vectors);
    if (mean_grad.has_value()) {
      const Vector<T> means("mean_grad", *mean_grad, x);
      const Vector<T> slopes("mean_grad_xhat", *mean_grad_xhat, x);
      const T values = static_cast<T>(count);
      b.mean_grad = vectors.add([&](int64_t c) { return means[c] / values; });
      b.slope = vectors.add([&](int64_t c) { return given.rstd[c] * (slopes[c] / values); });
    }
    b.dx = dx.data_ptr<T>();
    b.d_residual = to_residual ? d_residual.data_ptr<T>() : nullptr;
    const BatchNormFunctions<T>& kernels = current_functions<T>();
    for_rows(cut, [&](const Piece& piece) { kernels.backward(b, piece); });
  });
  return {dx, d_residual};
}

}  // namespace deeplab_fast::cpu
