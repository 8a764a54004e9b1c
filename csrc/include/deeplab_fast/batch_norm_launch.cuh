// The launches behind each op of batch norm in training. Without torch; launch.cuh has what Launch
// is.
//
// kWidth is kVectorWidth<T> where channels are a multiple of it and all maps and vectors begin at
// multiples of 16 bytes, else 1. `partial` has PixelPlan::partial_size() floats.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "deeplab_fast/batch_norm.cuh"

namespace deeplab_fast::cuda {

// Calls run(std::integral_constant<Act, act>{}).
template <typename Run>
void with_act(Act act, const Run& run) {
  switch (act) {
    case Act::kNone:
      return run(std::integral_constant<Act, Act::kNone>{});
    case Act::kRelu:
      return run(std::integral_constant<Act, Act::kRelu>{});
    case Act::kRelu6:
      return run(std::integral_constant<Act, Act::kRelu6>{});
    case Act::kHardswish:
      return run(std::integral_constant<Act, Act::kHardswish>{});
  }
}

// The plan of batch_stats and bn_act_reduce: as few chunks as keep a GPU busy.
template <typename T, int kWidth>
PixelPlan plan_reduction(int64_t pixels, int channels) {
  return plan_pixels<T, kWidth>(pixels, channels, std::numeric_limits<int64_t>::max());
}

// The plan of bn_act and bn_act_backward.
template <typename T, int kWidth>
PixelPlan plan_map(int64_t pixels, int channels) {
  return plan_pixels<T, kWidth>(pixels, channels, kMapSteps);
}

inline Grid finish_grid(int channels, size_t found_bytes) {
  return {(channels + kFinishChannels - 1) / kFinishChannels, kFinishThreads,
          found_bytes * kFinishThreads};
}

template <typename T, int kWidth, typename Launch>
void launch_batch_stats(const Launch& launch, const PixelPlan& plan, const void* x, float* partial,
                        float* mean, float* variance) {
  if (plan.channels == 0) return;
  if (plan.chunks > 0) {
    const size_t shared_bytes = sizeof(Moments<kWidth>) * plan.threads();
    launch(batch_stats_kernel<T, kWidth>, Grid{plan.blocks(), plan.threads(), shared_bytes}, plan,
           x, partial);
  }
  launch(finish_stats_kernel, finish_grid(plan.channels, sizeof(Moments<1>)), plan, partial, mean,
         variance);
}

template <typename T, int kWidth, typename Launch>
void launch_bn_act(const Launch& launch, const PixelPlan& plan, Act act, const BatchNorm& norm,
                   const void* x, const void* residual, void* y) {
  if (plan.chunks == 0) return;
  with_act(act, [&](auto which) {
    launch(bn_act_kernel<T, kWidth, which>, Grid{plan.blocks(), plan.threads()}, plan, norm, x,
           residual, y);
  });
}

template <typename T, int kWidth, typename Launch>
void launch_bn_act_reduce(const Launch& launch, const PixelPlan& plan, Act act,
                          const BatchNorm& norm, const void* grad, const void* x, const void* out,
                          float* partial, float* grad_sum, float* grad_xhat_sum) {
  if (plan.channels == 0) return;
  if (plan.chunks > 0) {
    const size_t shared_bytes = sizeof(Sums<kWidth>) * plan.threads();
    with_act(act, [&](auto which) {
      launch(bn_act_reduce_kernel<T, kWidth, which>,
             Grid{plan.blocks(), plan.threads(), shared_bytes}, plan, norm, grad, x, out, partial);
    });
  }
  launch(finish_sums_kernel, finish_grid(plan.channels, sizeof(Sums<1>)), plan, partial, norm.rstd,
         grad_sum, grad_xhat_sum);
}

template <typename T, int kWidth, typename Launch>
void launch_bn_act_backward(const Launch& launch, const PixelPlan& plan, Act act,
                            const BatchNorm& norm, const void* grad, const void* x, const void* out,
                            const float* mean_grad, const float* mean_grad_xhat, void* x_grad,
                            void* residual_grad) {
  if (plan.chunks == 0) return;
  with_act(act, [&](auto which) {
    launch(bn_act_backward_kernel<T, kWidth, which>, Grid{plan.blocks(), plan.threads()}, plan,
           norm, grad, x, out, mean_grad, mean_grad_xhat, x_grad, residual_grad);
  });
}

}  // namespace deeplab_fast::cuda
