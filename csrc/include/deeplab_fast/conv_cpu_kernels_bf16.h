// The products of bf16 and what else a set needs for maps of bf16. Included behind
// conv_cpu_kernels.h, in the same way.
namespace deeplab_fast::cpu::DEEPLAB_FAST_SET {

#define DEEPLAB_FAST_INLINE inline __attribute__((always_inline))
#define DEEPLAB_FAST_LAMBDA __attribute__((always_inline))

constexpr int kPair = kPerWord<BFloat16>;

// A pair, or one beside a zero, in every lane.
DEEPLAB_FAST_INLINE Words broadcast_pair(const BFloat16* from, Index<2>) {
  uint32_t word;
  __builtin_memcpy(&word, from, sizeof(word));
  return word - Words{};
}

DEEPLAB_FAST_INLINE Words broadcast_pair(const BFloat16* from, Index<1>) {
  return from->bits - Words{};
}

DEEPLAB_FAST_INLINE Words load_pairs(const BFloat16* from) {
  Words words;
  __builtin_memcpy(&words, from, sizeof(words));
  return words;
}

// sum + a[0] * b[0] + a[1] * b[1] of the pairs in each lane.
DEEPLAB_FAST_INLINE Vector dot(Vector sum, Words a, Words b) {
#if defined(DEEPLAB_FAST_BF16_INSTRUCTIONS)
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a));
#else
  constexpr uint32_t kUpper = 0xffff0000;
  sum += reinterpret_cast<Vector>(a & kUpper) * reinterpret_cast<Vector>(b & kUpper);
  return sum + reinterpret_cast<Vector>(a << 16) * reinterpret_cast<Vector>(b << 16);
#endif
}

// kCount rows from `row` times kVectors vectors of columns from `column`, `vector_stride` apart.
template <int kCount, int kVectors>
void multiply_pairs(const ProductOf<BFloat16>& product, int64_t row, int64_t column,
                    const BFloat16* panel, int64_t vector_stride) {
  const int64_t a_stride = product.a_stride, c_stride = product.c_stride, depth = product.depth;
  const BFloat16* const a = product.a + row * a_stride;
  float* const c = product.c + row * c_stride + column;
  constexpr int kLine = 2 * kPanel;
  const BFloat16* const next = product.prefetch_rows ? a + kCount * a_stride : a;
  for (int64_t begin = 0; begin < depth; begin += product.run) {
    const int64_t end = depth - begin < product.run ? depth : begin + product.run;
    Vector sum[kCount][kVectors] = {};
    const auto step = [&](int64_t k, auto factors) DEEPLAB_FAST_LAMBDA {
      Words b[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) b[j] = load_pairs(panel + k * kPanel + j * vector_stride);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const Words value = broadcast_pair(a + i * a_stride + k, factors);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] = dot(sum[i][j], value, b[j]);
      }
    };
    int64_t k = begin;
    for (; k + kLine <= end; k += kLine) {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) __builtin_prefetch(next + i * a_stride + k);
      for (int q = 0; q < kLine; q += kPair) step(k + q, Index<2>{});
    }
    for (; k + kPair <= end; k += kPair) step(k, Index<2>{});
    if (k < end) step(k, Index<1>{});
    if (product.accumulate || begin > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[i][j] += load(c + i * c_stride + j * kLanes);
      }
    }
    if (product.epilogue != nullptr && end == depth) {
      // A copy: what is behind the pointer would be read again after each store.
      const EpilogueOf<BFloat16> epilogue = *product.epilogue;
      // Sums that a loop takes from memory leave few instructions for each size of tile.
      float sums[kCount][kVectors][kLanes];
      __builtin_memcpy(sums, sum, sizeof(sums));
      for (int i = 0; i < kCount; ++i) {
        for (int j = 0; j < kVectors; ++j) {
          finish(load(sums[i][j]), product.first_pixel + row + i, column + j * kLanes, epilogue);
        }
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) store(c + i * c_stride + j * kLanes, sum[i][j]);
      }
    }
  }
}

using MultiplyPairs = void (*)(const ProductOf<BFloat16>&, int64_t, int64_t, const BFloat16*,
                               int64_t);

// All rows times kVectors vectors of columns.
template <int kVectors>
void multiply_pairs_columns(const ProductOf<BFloat16>& product, int64_t column,
                            const BFloat16* panel, int64_t vector_stride) {
  int64_t row = 0;
  for (; row + kRows <= product.rows; row += kRows) {
    multiply_pairs<kRows, kVectors>(product, row, column, panel, vector_stride);
  }
  MultiplyPairs rest = nullptr;
  unrolled<1, kRows>([&](auto count) DEEPLAB_FAST_LAMBDA {
    if (count.value == product.rows - row) rest = multiply_pairs<decltype(count)::value, kVectors>;
  });
  if (rest != nullptr) rest(product, row, column, panel, vector_stride);
}

void multiply_bf16(const ProductOf<BFloat16>& product) {
  // Vectors of one panel, or of panels that are one vector wide.
  const int64_t vector_stride = kParts > 1 ? kPair * kLanes : product.panel_stride;
  const int64_t vectors = product.num_panels * kParts;
  int64_t v = 0;
  const auto columns = [&](auto count) DEEPLAB_FAST_LAMBDA {
    for (; v + count.value <= vectors; v += count.value) {
      const BFloat16* const panel =
          product.panels + v / kParts * product.panel_stride + v % kParts * kPair * kLanes;
      multiply_pairs_columns<decltype(count)::value>(product, v * kLanes, panel, vector_stride);
    }
  };
  columns(Index<kColumns>{});
  if constexpr (kColumns > 2) columns(Index<2>{});
  columns(Index<1>{});
}

template <int kForm>
constexpr void set_form(FormKernels& form) {
  MapKernels<BFloat16>& maps = form;
  maps = {input_rows<kForm, BFloat16>, output_columns<kForm, BFloat16>};
  FactorKernels<BFloat16>& factors = form;
  factors = {input_columns<kForm, BFloat16>};
}

// Kernels with those for bf16.
constexpr ConvKernels with_bf16(ConvKernels kernels) {
  set_form<kLine1>(kernels.forms[kLine1]);
  set_form<kLine2>(kernels.forms[kLine2]);
  set_form<kLine3>(kernels.forms[kLine3]);
  set_form<kTile2>(kernels.forms[kTile2]);
  set_form<kTile3>(kernels.forms[kTile3]);
  set_form<kTile4>(kernels.forms[kTile4]);
  set_form<kTile6>(kernels.forms[kTile6]);
  kernels.multiply_bf16 = multiply_bf16;
  return kernels;
}

#undef DEEPLAB_FAST_INLINE
#undef DEEPLAB_FAST_LAMBDA

}  // namespace deeplab_fast::cpu::DEEPLAB_FAST_SET
