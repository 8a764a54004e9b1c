// The CUDA kernels of batch norm and their launches, on the host, for ctypes.
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_on_host.h"
#include "elements_on_host.h"

// After the functions that it calls.
#include "deeplab_fast/batch_norm_launch.cuh"

using namespace deeplab_fast::cuda;

namespace {

const cuda_on_host::Launch launch;
std::string error;

// How the elements of maps are stored: 0 fp32, 1 fp16, 2 bf16; in accesses of 16 bytes or of one
// element.
struct Form {
  int64_t element;
  bool vectors;

  template <typename Function>
  void run(const Function& function) const {
    const auto with = [&](auto type) {
      using T = decltype(type);
      if (vectors) {
        function(type, std::integral_constant<int, kVectorWidth<T>>{});
      } else {
        function(type, std::integral_constant<int, 1>{});
      }
    };
    if (element == 0) with(float{});
    if (element == 1) with(Half{});
    if (element == 2) with(Bfloat16{});
  }
};

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

std::vector<float> unwritten(int64_t count) {
  return std::vector<float>(count, std::numeric_limits<float>::quiet_NaN());
}

}  // namespace

extern "C" {

const char* last_error() { return error.c_str(); }

// columns, rows, groups, chunk, chunks
int plan(int64_t element, bool vectors, int64_t pixels, int64_t channels, bool reduction,
         int64_t* out) {
  return guarded([&] {
    Form{element, vectors}.run([&](auto type, auto width) {
      using T = decltype(type);
      const int c = static_cast<int>(channels);
      const PixelPlan made =
          reduction ? plan_reduction<T, width>(pixels, c) : plan_map<T, width>(pixels, c);
      for (const int64_t value : {int64_t{made.columns}, int64_t{made.rows}, int64_t{made.groups},
                                  made.chunk, made.chunks}) {
        *out++ = value;
      }
    });
  });
}

int batch_stats(int64_t element, bool vectors, int64_t pixels, int64_t channels, const void* x,
                float* mean, float* variance) {
  return guarded([&] {
    Form{element, vectors}.run([&](auto type, auto width) {
      using T = decltype(type);
      const PixelPlan plan = plan_reduction<T, width>(pixels, static_cast<int>(channels));
      std::vector<float> partial = unwritten(plan.partial_size());
      launch_batch_stats<T, width>(launch, plan, x, partial.data(), mean, variance);
    });
  });
}

// norm: mean, rstd, weight and bias, [channels] each.
int bn_act(int64_t element, bool vectors, int64_t pixels, int64_t channels, int64_t act,
           const float* mean, const float* rstd, const float* weight, const float* bias,
           const void* x, const void* residual, void* y) {
  return guarded([&] {
    Form{element, vectors}.run([&](auto type, auto width) {
      using T = decltype(type);
      launch_bn_act<T, width>(launch, plan_map<T, width>(pixels, static_cast<int>(channels)),
                              static_cast<Act>(act), {mean, rstd, weight, bias}, x, residual, y);
    });
  });
}

int bn_act_reduce(int64_t element, bool vectors, int64_t pixels, int64_t channels, int64_t act,
                  const float* mean, const float* rstd, const float* weight, const float* bias,
                  const void* grad, const void* x, const void* out, float* sum, float* xhat_sum) {
  return guarded([&] {
    Form{element, vectors}.run([&](auto type, auto width) {
      using T = decltype(type);
      const PixelPlan plan = plan_reduction<T, width>(pixels, static_cast<int>(channels));
      std::vector<float> partial = unwritten(plan.partial_size());
      launch_bn_act_reduce<T, width>(launch, plan, static_cast<Act>(act),
                                     {mean, rstd, weight, bias}, grad, x, out, partial.data(), sum,
                                     xhat_sum);
    });
  });
}

int bn_act_backward(int64_t element, bool vectors, int64_t pixels, int64_t channels, int64_t act,
                    const float* mean, const float* rstd, const float* weight, const float* bias,
                    const void* grad, const void* x, const void* out, const float* mean_grad,
                    const float* mean_grad_xhat, void* x_grad, void* residual_grad) {
  return guarded([&] {
    Form{element, vectors}.run([&](auto type, auto width) {
      using T = decltype(type);
      launch_bn_act_backward<T, width>(launch,
                                       plan_map<T, width>(pixels, static_cast<int>(channels)),
                                       static_cast<Act>(act), {mean, rstd, weight, bias}, grad, x,
                                       out, mean_grad, mean_grad_xhat, x_grad, residual_grad);
    });
  });
}

}  // extern "C"
