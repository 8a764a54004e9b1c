// CUDA kernels of batch norm in training, for sm_80 and newer. Without torch.
//
// A map is [pixels, channels], the channels of a pixel side by side. A thread keeps to the channels
// of one access, 16 bytes of a pixel or, where channels or addresses do not divide so, one element.
// What belongs to a channel is thus loaded once, and the thread walks down the pixels of its block,
// kUnroll of them at a time. A block is `columns` threads wide, up to 512 bytes of a pixel, and
// `rows` high; its pixels are a chunk of the map.
//
//   batch_stats       (count, mean, M2) of each chunk, which finish_stats combines
//   bn_act            y = act(before), before = (x - mean) * scale + bias + residual, with
//                     scale = rstd * weight, NaN where that is infinite (see reference.py)
//   bn_act_reduce     sums of g = grad * act'(before) and of g * (x - mean) of each chunk, which
//                     finish_sums adds up
//   bn_act_backward   dx = scale * (g - mean_grad - xhat * mean_grad_xhat), d residual = g
//
// The chunks depend on the shape alone and are combined in a fixed order, without atomics: results
// are the same bits in every run. Everything is computed in fp32. `before` is Normalise::operator()
// everywhere: the gradient takes the side of an activation's kink that the output took.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "deeplab_fast/element.cuh"
#include "deeplab_fast/launch.cuh"

namespace deeplab_fast::cuda {

// Most threads of a block.
constexpr int kNormThreads = 256;
// Blocks of a multiprocessor. Left to itself, ptxas spills on sm_100 to make room for a third.
constexpr int kNormResident = 2;
// Pixels whose loads a thread has under way at the same time.
constexpr int kUnroll = 4;
// Bytes of a pixel that a block reads at most: four lines of the cache.
constexpr int kPixelBytes = 512;
// Blocks that a reduction is cut into at most, several for each multiprocessor.
constexpr int64_t kNormBlocks = 1024;
// Pixels of a thread at most where its block has no sums to hand on.
constexpr int64_t kMapSteps = 16;
// Channels of a block that combines chunks: a sector of the cache.
constexpr int kFinishChannels = 8;
// Its threads: there are few such blocks, so that a thread must not have many chunks.
constexpr int kFinishThreads = 1024;

enum class Act { kNone, kRelu, kRelu6, kHardswish };

template <typename T>
using Stored = std::conditional_t<std::is_same_v<T, float>, float, uint16_t>;

// Elements of 16 bytes.
template <typename T>
constexpr int kVectorWidth = 16 / sizeof(Stored<T>);

// How a map is cut. Blocks are (chunk, group of columns), the last fastest.
struct PixelPlan {
  int64_t pixels;
  int channels;
  int columns;
  int rows;
  int groups;
  int64_t chunk;   // pixels of a chunk; the last has what is left
  int64_t chunks;  // 0 for a map without values

  int threads() const { return columns * rows; }
  int64_t blocks() const { return chunks * groups; }
  // Floats of what the chunks of a reduction hand on: [chunks, 2, channels].
  int64_t partial_size() const { return chunks * 2 * channels; }
};

// For accesses of kWidth elements by threads that take `most_steps` pixels or, where that makes
// too few blocks to fill a GPU, fewer.
template <typename T, int kWidth>
PixelPlan plan_pixels(int64_t pixels, int channels, int64_t most_steps) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  PixelPlan plan{pixels, channels, 0, 0, 0, 0, 0};
  if (pixels == 0 || channels == 0) return plan;
  const int64_t accesses = divide_up(channels, kWidth);
  const int64_t widest =
      std::min<int64_t>(kNormThreads, kPixelBytes / (kWidth * sizeof(Stored<T>)));
  plan.groups = static_cast<int>(divide_up(accesses, widest));
  plan.columns = static_cast<int>(divide_up(accesses, plan.groups));
  plan.rows = kNormThreads / plan.columns;
  const int64_t wanted = divide_up(pixels * plan.groups, plan.rows * kNormBlocks);
  const int64_t steps = std::clamp<int64_t>(wanted, kUnroll, most_steps);
  plan.chunk = divide_up(steps, kUnroll) * kUnroll * plan.rows;
  plan.chunks = divide_up(pixels, plan.chunk);
  return plan;
}

// Where a thread works: elements first, first + step, ... before `end` begin its pixels' accesses.
// A thread to the right of the last channel has no pixel.
struct Place {
  int64_t chunk, first, end, step;
  int channel, row;
  bool inside;

  __device__ Place(const PixelPlan& plan, int width) {
    const int thread = static_cast<int>(threadIdx.x);
    row = thread / plan.columns;
    const int column =
        static_cast<int>(blockIdx.x % plan.groups) * plan.columns + (thread - row * plan.columns);
    chunk = blockIdx.x / plan.groups;
    inside = column < (plan.channels + width - 1) / width;
    channel = inside ? column * width : 0;
    const int64_t begin = chunk * plan.chunk;
    const int64_t left = plan.pixels - begin;
    first = (begin + row) * plan.channels + channel;
    end = inside ? (begin + (left < plan.chunk ? left : plan.chunk)) * plan.channels : 0;
    step = static_cast<int64_t>(plan.rows) * plan.channels;
  }
};

// Calls body(std::integral_constant<int, n>{}, at) for the next n pixels of a thread, from element
// `at` on: for kUnroll of them while there are so many, then for one.
template <typename Body>
__device__ inline void for_pixels(const Place& place, const Body& body) {
  int64_t at = place.first;
  for (; at + (kUnroll - 1) * place.step < place.end; at += kUnroll * place.step) {
    body(std::integral_constant<int, kUnroll>{}, at);
  }
  for (; at < place.end; at += place.step) body(std::integral_constant<int, 1>{}, at);
}

// The elements of an access, as they are stored.
template <typename T, int kWidth>
struct Access {
  static_assert(kWidth == 1 || kWidth == kVectorWidth<T>);
  uint32_t word[kWidth == 1 ? 1 : 4];

  __device__ void load(const void* map, int64_t at) {
    const Stored<T>* from = static_cast<const Stored<T>*>(map) + at;
    if constexpr (kWidth > 1) {
      const Vector four = ptx::read_only(reinterpret_cast<const Vector*>(from));
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = four.word[i];
    } else if constexpr (std::is_same_v<T, float>) {
      word[0] = ptx::bits_of(ptx::read_only(from));
    } else {
      word[0] = ptx::read_only(from);
    }
  }

  __device__ float get(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return ptx::float_of(word[i]);
    } else {
      return ptx::unpack<T>(static_cast<uint16_t>(word[i / 2] >> 16 * (i % 2)));
    }
  }

  // Rounds once.
  __device__ static void store(void* map, int64_t at, const float (&value)[kWidth]) {
    Stored<T>* to = static_cast<Stored<T>*>(map) + at;
    if constexpr (kWidth == 1) {
      if constexpr (std::is_same_v<T, float>) {
        *to = value[0];
      } else {
        *to = static_cast<uint16_t>(ptx::pack<T>(value[0], 0.f));
      }
    } else {
      Vector four;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          four.word[i] = ptx::bits_of(value[i]);
        } else {
          four.word[i] = ptx::pack<T>(value[2 * i], value[2 * i + 1]);
        }
      }
      *reinterpret_cast<Vector*>(to) = four;
    }
  }
};

// The same access of n pixels.
template <typename T, int kWidth, int n>
__device__ inline void load_pixels(Access<T, kWidth> (&to)[n], const void* map, int64_t at,
                                   int64_t step) {
#pragma unroll
  for (int i = 0; i < n; ++i) to[i].load(map, at + i * step);
}

// One fp32 value for each channel of an access.
template <int kWidth>
__device__ inline void load_channels(float (&to)[kWidth], const float* from, int channel) {
  if constexpr (kWidth == 1) {
    to[0] = ptx::read_only(from + channel);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const Vector four = ptx::read_only(reinterpret_cast<const Vector*>(from + channel + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = ptx::float_of(four.word[j]);
    }
  }
}

template <int kWidth>
__device__ inline void store_channels(float* to, int64_t at, const float (&value)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; i += kWidth == 1 ? 1 : 4) {
    if constexpr (kWidth == 1) {
      to[at] = value[0];
    } else {
      *reinterpret_cast<Vector*>(to + at + i) = {ptx::bits_of(value[i]), ptx::bits_of(value[i + 1]),
                                                 ptx::bits_of(value[i + 2]),
                                                 ptx::bits_of(value[i + 3])};
    }
  }
}

// Number of values, their mean, and the sum of the squares of their distances from it.
template <int kWidth>
struct Moments {
  float count = 0.f;
  float mean[kWidth] = {};
  float m2[kWidth] = {};

  // Of the values of both; Chan, Golub and LeVeque (1983).
  __device__ void merge(const Moments& other) {
    if (other.count == 0.f) return;
    const float total = count + other.count;
    const float share = other.count / total;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float apart = other.mean[i] - mean[i];
      mean[i] = fmaf(apart, share, mean[i]);
      m2[i] += fmaf(apart * apart, count * share, other.m2[i]);
    }
    count = total;
  }

  // Calls visit(value) for each float.
  template <typename Visit>
  __device__ void each(const Visit& visit) {
    visit(count);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) visit(mean[i]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) visit(m2[i]);
  }
};

// Sums of g and of g * (x - mean).
template <int kWidth>
struct Sums {
  float grad[kWidth] = {};
  float grad_x[kWidth] = {};

  __device__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      grad[i] += other.grad[i];
      grad_x[i] += other.grad_x[i];
    }
  }

  template <typename Visit>
  __device__ void each(const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) visit(grad[i]);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) visit(grad_x[i]);
  }
};

// Merges what the rows of a block have, as a tree, into that of row 0. All threads call it; the
// dynamic shared memory has room for `found` of each.
template <typename Found>
__device__ inline void merge_rows(Found& found, int columns, int rows) {
  float* const memory = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = columns * rows;
  const auto place_of = [&](int slot, int value) -> float& {
    return memory[value * threads + slot];
  };
  int half = 1;
  while (2 * half < rows) half *= 2;
  for (int from = rows; from > 1; from = half, half /= 2) {
    // Rows from `half` to `from` go to those above them.
    const int row = thread / columns;
    if (row >= half && row < from) {
      int i = 0;
      found.each([&](float& value) { place_of(thread, i++) = value; });
    }
    __syncthreads();
    if (row < half && row + half < from) {
      Found other;
      int i = 0;
      other.each([&](float& value) { value = place_of(thread + half * columns, i++); });
      found.merge(other);
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kNormThreads, kNormResident)
    batch_stats_kernel(const PixelPlan plan, const void* x, float* partial) {
  const Place place(plan, kWidth);
  Moments<kWidth> found;
  for_pixels(place, [&](auto count, int64_t at) {
    constexpr int n = decltype(count)::value;
    Access<T, kWidth> values[n];
    load_pixels(values, x, at, place.step);
    Moments<kWidth> these;
    these.count = n;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < n; ++k) sum += values[k].get(i);
      const float mean = sum * (1.f / n);
      these.mean[i] = mean;
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const float apart = values[k].get(i) - mean;
        these.m2[i] = fmaf(apart, apart, these.m2[i]);
      }
    }
    found.merge(these);
  });
  merge_rows(found, plan.columns, plan.rows);
  if (place.row == 0 && place.inside) {
    float* const to = partial + place.chunk * 2 * plan.channels;
    store_channels(to, place.channel, found.mean);
    store_channels(to + plan.channels, place.channel, found.m2);
  }
}

// What the chunks of a channel have, merged in a fixed order: `read(chunk, of, and the one behind
// it)`. A block has kFinishChannels channels.
template <typename Found, typename Read>
__device__ inline Found merge_chunks(const PixelPlan& plan, const float* partial, int channel,
                                     const Read& read) {
  constexpr int kRows = kFinishThreads / kFinishChannels;
  Found found;
  if (channel < plan.channels) {
#pragma unroll 4
    for (int64_t chunk = threadIdx.x / kFinishChannels; chunk < plan.chunks; chunk += kRows) {
      const float* from = partial + chunk * 2 * plan.channels + channel;
      found.merge(read(chunk, from[0], from[plan.channels]));
    }
  }
  merge_rows(found, kFinishChannels, kRows);
  return found;
}

__device__ inline int finished_channel() {
  return static_cast<int>(blockIdx.x * kFinishChannels + threadIdx.x % kFinishChannels);
}

// Mean and biased variance of each channel; zeros without values.
__global__ void __launch_bounds__(kFinishThreads)
    finish_stats_kernel(const PixelPlan plan, const float* partial, float* mean, float* variance) {
  const int channel = finished_channel();
  const auto found = merge_chunks<Moments<1>>(
      plan, partial, channel, [&](int64_t chunk, float chunk_mean, float chunk_m2) {
        const int64_t left = plan.pixels - chunk * plan.chunk;
        Moments<1> these;
        these.count = static_cast<float>(left < plan.chunk ? left : plan.chunk);
        these.mean[0] = chunk_mean;
        these.m2[0] = chunk_m2;
        return these;
      });
  if (threadIdx.x < kFinishChannels && channel < plan.channels) {
    mean[channel] = found.mean[0];
    variance[channel] = plan.pixels > 0 ? found.m2[0] / static_cast<float>(plan.pixels) : 0.f;
  }
}

// Sums of g and of g * xhat.
__global__ void __launch_bounds__(kFinishThreads)
    finish_sums_kernel(const PixelPlan plan, const float* partial, const float* rstd,
                       float* grad_sum, float* grad_xhat_sum) {
  const int channel = finished_channel();
  const auto found =
      merge_chunks<Sums<1>>(plan, partial, channel, [](int64_t, float grad, float grad_x) {
        Sums<1> these;
        these.grad[0] = grad;
        these.grad_x[0] = grad_x;
        return these;
      });
  if (threadIdx.x < kFinishChannels && channel < plan.channels) {
    grad_sum[channel] = found.grad[0];
    grad_xhat_sum[channel] = found.grad_x[0] * rstd[channel];
  }
}

// [channels] each, fp32.
struct BatchNorm {
  const float* mean;
  const float* rstd;
  const float* weight;
  const float* bias;
};

// Of the channels of an access.
template <int kWidth>
struct Normalise {
  float mean[kWidth], scale[kWidth], bias[kWidth];

  __device__ Normalise(const BatchNorm& norm, int channel) {
    float weight[kWidth];
    load_channels(mean, norm.mean, channel);
    load_channels(scale, norm.rstd, channel);
    load_channels(weight, norm.weight, channel);
    load_channels(bias, norm.bias, channel);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      scale[i] *= weight[i];
      scale[i] += scale[i] - scale[i];
    }
  }

  // What the activation sees of value x of channel i, but for a residual.
  __device__ float operator()(float x, int i) const { return fmaf(x - mean[i], scale[i], bias[i]); }
};

// NaN stays NaN.
template <Act kAct>
__device__ inline float activate(float v) {
  const auto relu6 = [](float u) { return u < 0.f ? 0.f : u > 6.f ? 6.f : u; };
  if constexpr (kAct == Act::kRelu) return v < 0.f ? 0.f : v;
  if constexpr (kAct == Act::kRelu6) return relu6(v);
  if constexpr (kAct == Act::kHardswish) return v * relu6(v + 3.f) * (1.f / 6.f);
  return v;
}

// The gradient to what the activation saw, or to `at` of the same derivative. At NaN no comparison
// takes it away.
template <Act kAct>
__device__ inline float activate_grad(float grad, float at) {
  if constexpr (kAct == Act::kRelu) return at <= 0.f ? 0.f : grad;
  if constexpr (kAct == Act::kRelu6) return at <= 0.f || at >= 6.f ? 0.f : grad;
  if constexpr (kAct == Act::kHardswish) {
    return at < -3.f ? 0.f : at > 3.f ? grad : grad * fmaf(at, 1.f / 3.f, 0.5f);
  }
  return grad;
}

// `residual` may be null.
template <typename T, int kWidth, Act kAct>
__global__ void __launch_bounds__(kNormThreads, kNormResident)
    bn_act_kernel(const PixelPlan plan, const BatchNorm norm, const void* x, const void* residual,
                  void* y) {
  const Place place(plan, kWidth);
  if (!place.inside) return;
  const Normalise<kWidth> before(norm, place.channel);
  for_pixels(place, [&](auto count, int64_t at) {
    constexpr int n = decltype(count)::value;
    Access<T, kWidth> values[n], added[n];
    load_pixels(values, x, at, place.step);
    if (residual != nullptr) load_pixels(added, residual, at, place.step);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      float out[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float v = before(values[k].get(i), i);
        out[i] = activate<kAct>(residual != nullptr ? v + added[k].get(i) : v);
      }
      Access<T, kWidth>::store(y, at + k * place.step, out);
    }
  });
}

// `out` is the result of bn_act, or null where x gives it again.
template <typename T, int kWidth, Act kAct>
__global__ void __launch_bounds__(kNormThreads, kNormResident)
    bn_act_reduce_kernel(const PixelPlan plan, const BatchNorm norm, const void* grad,
                         const void* x, const void* out, float* partial) {
  const Place place(plan, kWidth);
  const Normalise<kWidth> before(norm, place.channel);
  const bool from_out = kAct != Act::kNone && out != nullptr;
  Sums<kWidth> found;
  for_pixels(place, [&](auto count, int64_t at) {
    constexpr int n = decltype(count)::value;
    Access<T, kWidth> grads[n], values[n], outs[n];
    load_pixels(grads, grad, at, place.step);
    load_pixels(values, x, at, place.step);
    if (from_out) load_pixels(outs, out, at, place.step);
#pragma unroll
    for (int k = 0; k < n; ++k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float value = values[k].get(i);
        const float seen = from_out ? outs[k].get(i) : before(value, i);
        const float g = activate_grad<kAct>(grads[k].get(i), seen);
        found.grad[i] += g;
        found.grad_x[i] = fmaf(g, value - before.mean[i], found.grad_x[i]);
      }
    }
  });
  merge_rows(found, plan.columns, plan.rows);
  if (place.row == 0 && place.inside) {
    float* const to = partial + place.chunk * 2 * plan.channels;
    store_channels(to, place.channel, found.grad);
    store_channels(to + plan.channels, place.channel, found.grad_x);
  }
}

// mean_grad and mean_grad_xhat are null where mean and rstd are constants; `out` as above;
// `residual_grad` may be null.
template <typename T, int kWidth, Act kAct>
__global__ void __launch_bounds__(kNormThreads, kNormResident)
    bn_act_backward_kernel(const PixelPlan plan, const BatchNorm norm, const void* grad,
                           const void* x, const void* out, const float* mean_grad,
                           const float* mean_grad_xhat, void* x_grad, void* residual_grad) {
  const Place place(plan, kWidth);
  if (!place.inside) return;
  const Normalise<kWidth> before(norm, place.channel);
  const bool of_stats = mean_grad != nullptr;
  const bool from_out = kAct != Act::kNone && out != nullptr;
  const bool from_x = kAct != Act::kNone && out == nullptr;
  float constant[kWidth], slope[kWidth];
  if (of_stats) {
    float rstd[kWidth];
    load_channels(constant, mean_grad, place.channel);
    load_channels(slope, mean_grad_xhat, place.channel);
    load_channels(rstd, norm.rstd, place.channel);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) slope[i] *= rstd[i];
  }
  for_pixels(place, [&](auto count, int64_t at) {
    constexpr int n = decltype(count)::value;
    Access<T, kWidth> grads[n], values[n], outs[n];
    load_pixels(grads, grad, at, place.step);
    if (of_stats || from_x) load_pixels(values, x, at, place.step);
    if (from_out) load_pixels(outs, out, at, place.step);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      float g[kWidth], dx[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float seen = from_out ? outs[k].get(i) : from_x ? before(values[k].get(i), i) : 0.f;
        g[i] = activate_grad<kAct>(grads[k].get(i), seen);
        float whole = g[i];
        if (of_stats) {
          whole = fmaf(before.mean[i] - values[k].get(i), slope[i], whole - constant[i]);
        }
        dx[i] = before.scale[i] * whole;
      }
      Access<T, kWidth>::store(x_grad, at + k * place.step, dx);
      if (residual_grad != nullptr) {
        Access<T, kWidth>::store(residual_grad, at + k * place.step, g);
      }
    }
  });
}

}  // namespace deeplab_fast::cuda
