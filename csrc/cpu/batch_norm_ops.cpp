// The batch norm kernels on CPU tensors: checks, threads, memory. deeplab_fast/ops/batch_norm.py
// says what the ops compute.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "deeplab_fast/batch_norm_cpu.h"

namespace deeplab_fast::cpu {

using at::Tensor;

// csrc/cpu/upsample_ops.cpp
std::string instruction_set(std::string name);

namespace {

// Values that are worth a thread in a pass that keeps no sums.
constexpr int64_t kGrain = 1 << 15;

const BatchNormKernels& current_batch_norm_kernels() {
  const std::string name = instruction_set("");
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

void check_x(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 &&
                        (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) &&
                        x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.size(1) > 0,
                    "x must be a dense float32 or float64 map [N, C, H, W] in channels_last, got ",
                    x.scalar_type(), " ", x.sizes(), " with strides ", x.strides());
}

void check_like(const char* name, const Tensor& map, const Tensor& x) {
  TORCH_CHECK_VALUE(
      map.sizes() == x.sizes() && map.scalar_type() == x.scalar_type() &&
          map.device() == x.device() && map.is_contiguous(at::MemoryFormat::ChannelsLast),
      name, " must be a dense map in channels_last like x, ", x.scalar_type(), " ", x.sizes(),
      ", got ", map.scalar_type(), " ", map.sizes(), " with strides ", map.strides());
}

template <typename T>
const T* checked_vector(const char* name, const Tensor& vector, const Tensor& x) {
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == x.size(1) && vector.is_contiguous() &&
                        vector.scalar_type() == x.scalar_type() && vector.device() == x.device(),
                    name, " must be contiguous ", x.scalar_type(), " [", x.size(1), "], got ",
                    vector.scalar_type(), " ", vector.sizes());
  return vector.const_data_ptr<T>();
}

Activation checked_activation(std::string_view act, bool only_from_x) {
  if (act == "none") return Activation::kNone;
  if (act == "relu") return Activation::kRelu;
  if (act == "relu6") return Activation::kRelu6;
  TORCH_CHECK_VALUE(act == "hardswish", "act must be relu, relu6, hardswish or none, got ", act);
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
Tensor sums_of_pieces(const MapCut& cut, const Function& function) {
  Tensor parts = at::empty({cut.pieces(), 2, cut.channels}, at::kDouble);
  double* const to = parts.data_ptr<double>();
  at::parallel_for(0, cut.pieces(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[batch_norm_scratch(cut.width())]);
    for (int64_t i = begin; i < end; ++i) {
      function(cut.unit(i), scratch.get(), to + 2 * i * cut.channels);
    }
  });
  return parts;
}

template <typename Function>
void for_channels(const MapCut& cut, const Function& function) {
  at::parallel_for(0, cut.channels, std::max<int64_t>(1, kGrain / cut.pieces()), function);
}

template <typename T>
Backward<T> backward_arguments(const Tensor& grad, const Tensor& x, const Tensor& mean,
                               const Tensor& rstd, const Tensor& weight, const Tensor& bias,
                               const std::optional<Tensor>& out, std::string_view act,
                               RowVectors<T>& vectors) {
  const T* const means = checked_vector<T>("mean", mean, x);
  const T* const rstds = checked_vector<T>("rstd", rstd, x);
  const T* const weights = checked_vector<T>("weight", weight, x);
  const T* const biases = checked_vector<T>("bias", bias, x);
  check_like("grad", grad, x);
  if (out.has_value()) check_like("out", *out, x);
  Backward<T> b{};
  b.act = checked_activation(act, !out.has_value());
  b.grad = grad.const_data_ptr<T>();
  b.x = x.const_data_ptr<T>();
  b.out = out.has_value() ? out->const_data_ptr<T>() : nullptr;
  b.mean = vectors.add([&](int64_t c) { return means[c]; });
  b.scale = vectors.add([&](int64_t c) { return factor(rstds[c], weights[c]); });
  b.bias = vectors.add([&](int64_t c) { return biases[c]; });
  return b;
}

}  // namespace

std::tuple<Tensor, Tensor> batch_stats(const Tensor& x) {
  check_x(x);
  if (x.numel() == 0)
    return {at::zeros({x.size(1)}, x.options()), at::zeros({x.size(1)}, x.options())};
  const MapCut cut = cut_map(x);
  Tensor mean = at::empty({cut.channels}, x.options()), variance = at::empty_like(mean);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const BatchNormFunctions<T>& kernels = current_functions<T>();
    const T* const from = x.const_data_ptr<T>();
    const Tensor parts = sums_of_pieces<T>(cut, [&](const Piece& piece, T* scratch, double* to) {
      kernels.stats(from, piece, scratch, to);
    });
    std::vector<double> counts;
    for (int64_t i = 0; i < cut.pieces(); ++i) {
      const Piece piece = cut.unit(i);
      counts.push_back(static_cast<double>(piece.rows * piece.pixels));
    }
    T* const means = mean.data_ptr<T>();
    T* const variances = variance.data_ptr<T>();
    for_channels(cut, [&](int64_t begin, int64_t end) {
      kernels.combine_stats(parts.const_data_ptr<double>(), counts.data(), cut.pieces(),
                            cut.channels, begin, end, means, variances);
    });
  });
  return {mean, variance};
}

Tensor bn_act(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
              const Tensor& bias, const std::optional<Tensor>& residual, std::string_view act) {
  check_x(x);
  Tensor y = empty_map(x);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const means = checked_vector<T>("mean", mean, x);
    const T* const rstds = checked_vector<T>("rstd", rstd, x);
    const T* const weights = checked_vector<T>("weight", weight, x);
    const T* const biases = checked_vector<T>("bias", bias, x);
    if (residual.has_value()) check_like("residual", *residual, x);
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

std::tuple<Tensor, Tensor> bn_act_reduce(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                         const Tensor& rstd, const Tensor& weight,
                                         const Tensor& bias, const std::optional<Tensor>& out,
                                         std::string_view act) {
  check_x(x);
  Tensor sum = at::zeros({x.size(1)}, x.options()), sum_xhat = at::zeros_like(sum);
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const MapCut cut = cut_map(x);
    RowVectors<T> vectors(cut, 3);
    const Backward<T> b = backward_arguments(grad, x, mean, rstd, weight, bias, out, act, vectors);
    if (x.numel() == 0) return;
    const BatchNormFunctions<T>& kernels = current_functions<T>();
    const Tensor parts = sums_of_pieces<T>(cut, [&](const Piece& piece, T* scratch, double* to) {
      kernels.reduce(b, piece, scratch, to);
    });
    const T* const rstds = rstd.const_data_ptr<T>();
    T* const sums = sum.data_ptr<T>();
    T* const sums_xhat = sum_xhat.data_ptr<T>();
    for_channels(cut, [&](int64_t begin, int64_t end) {
      kernels.combine_sums(parts.const_data_ptr<double>(), cut.pieces(), cut.channels, begin, end,
                           rstds, sums, sums_xhat);
    });
  });
  return {sum, sum_xhat};
}

std::tuple<Tensor, Tensor> bn_act_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                           const Tensor& rstd, const Tensor& weight,
                                           const Tensor& bias, const std::optional<Tensor>& out,
                                           const std::optional<Tensor>& mean_grad,
                                           const std::optional<Tensor>& mean_grad_xhat,
                                           std::string_view act, bool to_residual) {
  check_x(x);
  TORCH_CHECK_VALUE(mean_grad.has_value() == mean_grad_xhat.has_value(),
                    "give both of mean_grad and mean_grad_xhat, or none of them");
  Tensor dx = empty_map(x);
  Tensor d_residual = to_residual ? empty_map(x) : at::empty({0}, x.options());
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const MapCut cut = cut_map(x);
    RowVectors<T> vectors(cut, 5);
    Backward<T> b = backward_arguments(grad, x, mean, rstd, weight, bias, out, act, vectors);
    if (mean_grad.has_value()) {
      const T* const means = checked_vector<T>("mean_grad", *mean_grad, x);
      const T* const slopes = checked_vector<T>("mean_grad_xhat", *mean_grad_xhat, x);
      const T* const rstds = rstd.const_data_ptr<T>();
      b.mean_grad = vectors.add([&](int64_t c) { return means[c]; });
      b.slope = vectors.add([&](int64_t c) { return rstds[c] * slopes[c]; });
    }
    b.dx = dx.data_ptr<T>();
    b.d_residual = to_residual ? d_residual.data_ptr<T>() : nullptr;
    const BatchNormFunctions<T>& kernels = current_functions<T>();
    for_rows(cut, [&](const Piece& piece) { kernels.backward(b, piece); });
  });
  return {dx, d_residual};
}

}  // namespace deeplab_fast::cpu
