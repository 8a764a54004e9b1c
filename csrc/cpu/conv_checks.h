// What ops on the kernels of conv_cpu.h have in common: checks, threads, memory.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "deeplab_fast/conv_run.h"
#include "deeplab_fast/workspace.h"
#include "instruction_sets.h"

namespace deeplab_fast::cpu {

using at::Tensor;

inline const ConvKernels& current_conv_kernels() {
  const std::string_view name = current_set_name(kConvolutions);
  for (const ConvKernels* kernels : {&conv_avx512(), &conv_avx2()}) {
    if (name == kernels->name) return *kernels;
  }
  return conv_baseline();
}

inline void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& function) {
  at::parallel_for(0, count, 1, function);
}

inline int64_t num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Memory for a call's buffers; nan where PyTorch fills what is not initialised.
inline Workspace allocate(int64_t floats) {
  Workspace workspace(floats);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    std::fill_n(workspace.data(), floats, std::numeric_limits<float>::quiet_NaN());
  }
  return workspace;
}

template <typename Value>
constexpr bool kIsFloat = std::is_same_v<Value, float>;

template <typename Value>
constexpr at::ScalarType kScalarType = kIsFloat<Value> ? at::kFloat : at::kBFloat16;

template <typename Value>
const Value* values(const Tensor& x) {
  return static_cast<const Value*>(x.const_data_ptr());
}

template <typename Value = float>
void check_map(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() == kScalarType<Value> &&
                        x.is_contiguous(at::MemoryFormat::ChannelsLast),
                    name, " must be a ", kIsFloat<Value> ? "float32" : "bfloat16",
                    " map [N, C, H, W] in channels_last, got ", x.scalar_type(), " ", x.sizes(),
                    " with strides ", x.strides());
}

template <typename Value = float>
InputMapOf<Value> input_map(const Tensor& x) {
  check_map<Value>("x", x);
  return {values<Value>(x), x.size(0), x.size(2), x.size(3), x.size(1)};
}

// function(zero of the type of a tensor's values).
template <typename Function>
void with_type(const Tensor& t, const Function& function) {
  if (t.scalar_type() == at::kBFloat16) {
    function(BFloat16{});
  } else {
    function(float{});
  }
}

// What places are computed from, by products that 64 bits hold then.
inline void check_options(const char* name, at::IntArrayRef options, int64_t least,
                          size_t count = 2) {
  TORCH_CHECK_VALUE(options.size() == count, name, " must be ", count, " numbers, got ", options);
  for (const int64_t option : options) {
    TORCH_CHECK_VALUE(option >= least && option <= std::numeric_limits<int32_t>::max(), name,
                      " must be from ", least, " to 2^31 - 1, got ", options);
  }
}

// Sets the bounds or the formula of an activation by its name.
template <typename Value>
void set_activation(std::string_view act, EpilogueOf<Value>& epilogue) {
  const float infinity = std::numeric_limits<float>::infinity();
  epilogue.low = act == "relu" || act == "relu6" ? 0 : -infinity;
  epilogue.high = act == "relu6" ? 6 : infinity;
  epilogue.hardswish = act == "hardswish";
  TORCH_CHECK_VALUE(act == "none" || epilogue.low == 0 || epilogue.hardswish, "act must be relu, ",
                    "relu6, hardswish or none, got ", act);
}

// The epilogue of a result of `images` maps of height x width pixels.
template <typename Value = float>
EpilogueOf<Value> make_epilogue(int64_t images, int64_t height, int64_t width, const Tensor& shift,
                                const std::optional<Tensor>& residual, const Tensor& out,
                                int64_t channel_offset, std::string_view act) {
  check_map<Value>("out", out);
  const int64_t channels = shift.size(-1);
  TORCH_CHECK_VALUE(out.size(0) == images && out.size(2) == height && out.size(3) == width &&
                        channel_offset >= 0 && channel_offset <= out.size(1) - channels,
                    "out ", out.sizes(), " has no place for ", channels, " channels from ",
                    channel_offset, " of a result for ", images, " maps of ", height, "x", width);
  TORCH_CHECK_VALUE(shift.scalar_type() == at::kFloat && shift.is_contiguous(),
                    "shift must be contiguous float32");
  EpilogueOf<Value> epilogue{};
  epilogue.shift = shift.const_data_ptr<float>();
  epilogue.channels = channels;
  epilogue.out = static_cast<Value*>(out.data_ptr()) + channel_offset;
  epilogue.out_stride = out.size(1);
  if (residual.has_value()) {
    check_map<Value>("residual", *residual);
    TORCH_CHECK_VALUE(residual->size(0) == images && residual->size(1) == channels &&
                          residual->size(2) == height && residual->size(3) == width,
                      "residual ", residual->sizes(), " does not fit ", images, " maps of ", height,
                      "x", width);
    epilogue.residual = values<Value>(*residual);
    epilogue.residual_stride = channels;
  }
  set_activation(act, epilogue);
  return epilogue;
}

}  // namespace deeplab_fast::cpu
