// Convolutions of csrc/include/deeplab_fast in threads of their own, for ThreadSanitizer, which
// does not see how OpenMP's threads wait: several callers at a time, each with a team, share
// weights and what workspaces keep. Each result must have the bits of a call in one thread.
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "deeplab_fast/conv_patches.h"
#include "deeplab_fast/conv_run.h"
#include "deeplab_fast/strips_run.h"
#include "deeplab_fast/workspace.h"

using namespace deeplab_fast::cpu;

namespace {

constexpr int kCallers = 3, kThreads = 3, kRounds = 6;

void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& function) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(function, i, i + 1);
  if (count > 0) function(0, 1);
  for (std::thread& other : others) other.join();
}

Workspace allocate(int64_t floats) { return Workspace(floats); }

std::vector<float> numbers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> found(count);
  for (float& value : found) value = normal(random);
  return found;
}

Epilogue epilogue_of(const std::vector<float>& shift, int64_t channels, float* out) {
  const float infinity = std::numeric_limits<float>::infinity();
  return {shift.data(), nullptr, 0, out, channels, channels, 0, infinity, false};
}

// A convolution that runs with so many threads and gives its map.
using Run = std::function<std::vector<float>(int64_t threads)>;

Run tiles(int64_t size, int64_t channels, int64_t outputs, int64_t dilation) {
  constexpr int kForm = 5;
  const ConvKernels& kernels = conv_baseline();
  const Form& form = kForms[kForm];
  const int64_t panels = padded(outputs) / kPanel, products = form.products * form.products;
  std::vector<float> prepared(products * panels * channels * kPanel);
  const std::vector<float> weights = numbers(outputs * channels * 9, 1);
  for (int64_t panel = 0; panel < panels; ++panel) {
    kernels.prepare(weights.data(), outputs, channels, panel, form, form,
                    prepared.data() + panel * channels * kPanel, panels * channels * kPanel);
  }
  return [=, prepared = std::move(prepared), x = numbers(2 * size * size * channels, 2),
          shift = numbers(outputs, 3), &kernels](int64_t threads) {
    std::vector<float> out(2 * size * size * outputs);
    std::vector<TileGroup> groups;
    for (const AxisTiles& rows : cut_axis(size, dilation, kForm, kForm)) {
      groups.push_back({rows, rows, prepared.data()});
    }
    run_tiles(kernels, InputMap{x.data(), 2, size, size, channels}, groups,
              epilogue_of(shift, outputs, out.data()), static_cast<int>(dilation), 0, threads,
              cache_shares(0), parallel, allocate);
    return out;
  };
}

Run patches(int64_t size, int64_t channels, int64_t outputs, int64_t taps, int64_t stride) {
  const int64_t depth = taps * taps * channels;
  return [=, x = numbers(2 * size * size * channels, 4), shift = numbers(outputs, 5),
          weights = numbers(padded(outputs) * depth, 6)](int64_t threads) {
    const PatchAxis rows{size, size * channels, taps, stride, taps / 2, 1};
    const PatchAxis columns{size, channels, taps, stride, taps / 2, 1};
    const Patches given{x.data(), 2, size * size * channels, channels, 1, rows, columns, false};
    std::vector<float> out(given.pixels() * outputs);
    run_patches(conv_baseline(), given, weights.data(), epilogue_of(shift, outputs, out.data()),
                threads, parallel, allocate);
    return out;
  };
}

Run block(int64_t size, int64_t channels, int64_t outputs) {
  const int64_t wide = 3 * channels;
  return
      [=, x = numbers(2 * size * size * channels, 7), expand = numbers(padded(wide) * channels, 8),
       to_wide = numbers(padded(wide), 9), filters = numbers(9 * padded(wide), 10),
       shift = numbers(wide, 11), project = numbers(padded(outputs) * wide, 12),
       last = numbers(outputs, 13)](int64_t threads) {
        std::vector<float> out(2 * size * size * outputs);
        InvertedResidual given{};
        given.x = {x.data(), 2, size, size, channels};
        given.channels = wide;
        given.rows = given.columns = {size, size, 3, 1, 1, 1};
        given.expand = expand.data();
        given.expanded = epilogue_of(to_wide, wide, nullptr);
        given.depthwise = filters.data();
        given.filtered = epilogue_of(shift, wide, nullptr);
        given.project = project.data();
        given.projected = epilogue_of(last, outputs, out.data());
        run_inverted_residual(strips_baseline(), given, threads, parallel, allocate);
        return out;
      };
}

}  // namespace

int main() {
  const std::vector<Run> runs = {
      // Blocks that all threads share, in stages; two phases; one block a thread.
      tiles(12, 32, 32, 1), tiles(9, 300, 20, 2), tiles(44, 16, 16, 1),
      // Patches of more than one chunk, pixels where they lie.
      patches(12, 80, 24, 3, 2), patches(16, 48, 40, 1, 1), block(16, 12, 20)};
  std::vector<std::vector<float>> wanted;
  for (const Run& run : runs) wanted.push_back(run(1));
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < kRounds; ++round) {
        const size_t i = (round + caller) % runs.size();
        const std::vector<float> found = runs[i](kThreads);
        wrong += std::memcmp(found.data(), wanted[i].data(), found.size() * sizeof(float)) != 0;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("%d calls, %d of other bits\n", kCallers * kRounds, wrong.load());
  return wrong != 0;
}
