// The CUDA kernels of the ASPP and their launches, on the host, for ctypes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "cuda_ptx_on_host.h"
#include "deeplab_fast/aspp_launch.cuh"
#include "deeplab_fast/aspp_sm80.cuh"
#include "deeplab_fast/aspp_sm90.cuh"

using namespace deeplab_fast::cuda;

namespace {

const cuda_on_host::Launch launch;
std::string error;

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

template <typename Function>
void with_element(bool half, const Function& function) {
  if (half) {
    function(Half{});
  } else {
    function(Bfloat16{});
  }
}

}  // namespace

extern "C" {

const char* last_error() { return error.c_str(); }

// The table of tiles, 8 numbers a row; returns the number of rows.
int tiles(int64_t* to) {
  for (const Tile& tile : kTiles) {
    for (const int64_t value :
         {int64_t{tile.architecture}, int64_t{tile.block_m}, int64_t{tile.block_n},
          int64_t{tile.threads()}, int64_t{tile.stages}, int64_t{tile.cluster},
          int64_t{tile.occupancy}, static_cast<int64_t>(tile.shared_bytes())}) {
      *to++ = value;
    }
  }
  return kTileCount;
}

// x_pitch, y_pitch: distances of images, rows and columns in elements. bytes: sizes of what may be
// read at x and at weight.
int aspp(bool half, int64_t tile, const uint16_t* x, const int64_t* x_pitch, int64_t channels,
         const uint16_t* weight, int64_t weight_rows, int64_t weight_pitch, const float* scale,
         const float* shift, int64_t shift_image, uint16_t* y, const int64_t* y_pitch, bool vectors,
         float* partial, const TapClass* classes, const Part* parts, const int* starts,
         int64_t programs, const Part* sums, int64_t cut_tiles, const int64_t* bytes,
         int64_t timing, int64_t seed) {
  return guarded([&] {
    Aspp op{};
    op.x = x;
    op.x_pitch = {x_pitch[0], x_pitch[1], x_pitch[2]};
    op.channels = static_cast<int>(channels);
    op.weight = weight;
    op.weight_pitch = weight_pitch;
    op.scale = scale;
    op.shift = shift;
    op.shift_image = shift_image;
    op.y = y;
    op.y_pitch = {y_pitch[0], y_pitch[1], y_pitch[2]};
    op.vectors = vectors;
    op.partial = partial;
    op.classes = classes;
    op.parts = parts;
    op.starts = starts;
    auto& machine = cuda_on_host::machine;
    machine.timing = static_cast<cuda_on_host::Timing>(timing);
    machine.random = cuda_on_host::Random(static_cast<uint64_t>(seed));
    const auto range = [](const void* p, int64_t size) {
      const auto* begin = static_cast<const unsigned char*>(p);
      return cuda_on_host::Range{begin, begin + size};
    };
    machine.readable = {range(x, bytes[0]), range(weight, bytes[1])};
    bool found = false;
    with_element(half, [&](auto type) {
      using T = decltype(type);
      found = with_tile<80>(tile, [&](auto row) {
        launch_programs<T, row>(launch, aspp_sm80_kernel<T, row>, op, programs, sums, cut_tiles);
      });
      found =
          found || with_tile<90>(tile, [&](auto row) {
            constexpr Tile kShape = kTiles[row];
            const ptx::TensorMap map{weight,       channels,      weight_rows,
                                     weight_pitch, Tile::block_c, kShape.block_n / kShape.cluster};
            launch_programs<T, row>(launch, aspp_sm90_kernel<T, row>, op, programs, sums, cut_tiles,
                                    map);
          });
    });
    cuda_on_host::require(found, "no such tile");
  });
}

// pooled [images, channels], weight [filters, channels], out [images, filters]; strides of pooled,
// then of weight.
int image_shift(bool half, const uint16_t* pooled, const uint16_t* weight, const int64_t* strides,
                const float* scale, const float* shift, float* out, int64_t images, int64_t filters,
                int64_t channels) {
  return guarded([&] {
    const ImageShift op{pooled,
                        strides[0],
                        strides[1],
                        weight,
                        strides[2],
                        strides[3],
                        scale,
                        shift,
                        out,
                        static_cast<int>(images),
                        static_cast<int>(filters),
                        static_cast<int>(channels)};
    with_element(half, [&](auto type) { launch_image_shift<decltype(type)>(launch, op); });
  });
}

// What a part reads: for each of `rows` rows the offset of its pixel, for each iteration the offset
// of its tap, the row of its first filter and its first channel.
void walk(const TapClass* classes, const Part* part, const int64_t* pitch, int64_t rows,
          int64_t* pixels, int64_t* iterations) {
  const TapClass& c = classes[part->tap_class];
  const Pitch x_pitch{pitch[0], pitch[1], pitch[2]};
  for (int i = 0; i < rows; ++i) pixels[i] = offset_of(locate_at_most(c, part->first, i), x_pitch);
  Taps taps(c, part->begin);
  for (int i = part->begin; i < part->end; ++i, taps.next()) {
    *iterations++ = taps.offset(x_pitch);
    *iterations++ = taps.weight_row();
    *iterations++ = taps.channel;
  }
}

}  // extern "C"
