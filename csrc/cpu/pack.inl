// The row kernels that only move: transposition, pairs, and other widths of floats. Part of rows.inl.

// kVector 32-bit words: one register where the instruction set has one as wide.
constexpr int kVector = FUSED_NCE_VECTOR;
using Words __attribute__((vector_size(kVector * 4))) = int;
using Halves __attribute__((vector_size(kVector * 2))) = uint16_t;

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct Count : Count<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct Count<0, kIndex...> {
  using type = Indices<kIndex...>;
};

// One step of the transposition: the elements of `a` whose index has the bit kStep change places with those of `b`
// whose index has not.
template <int kStep, int... kIndex>
inline __attribute__((always_inline)) void exchange(Words& a, Words& b, Indices<kIndex...>) {
  const Words low = __builtin_shufflevector(a, b, ((kIndex & kStep) ? kVector + kIndex - kStep : kIndex)...);
  b = __builtin_shufflevector(a, b, ((kIndex & kStep) ? kVector + kIndex : kIndex + kStep)...);
  a = low;
}

template <int kStep>
inline __attribute__((always_inline)) void exchange_all(Words* row) {
  if constexpr (kStep < kVector) {
    for (int i = 0; i < kVector; ++i)
      if (!(i & kStep)) exchange<kStep>(row[i], row[i + kStep], typename Count<kVector>::type());
    exchange_all<2 * kStep>(row);
  }
}

// `words(r, l)` is what rows r of the input hold at lanes l .. l + kVector - 1; rows from `rows` on do not exist.
template <class Load>
inline __attribute__((always_inline)) void transpose_words(int64_t rows, int64_t lanes, int* out, int64_t out_stride,
                                                           const Load& words) {
  for (int64_t r0 = 0; r0 < rows; r0 += kVector) {
    const int64_t here = rows - r0 < kVector ? rows - r0 : kVector;
    for (int64_t l0 = 0; l0 < lanes; l0 += kVector) {
      Words block[kVector];
      for (int64_t r = 0; r < kVector; ++r) block[r] = r < here ? words(r0 + r, l0) : Words{};
      exchange_all<1>(block);
      const int64_t used = lanes - l0 < kVector ? lanes - l0 : kVector;
      for (int64_t l = 0; l < used; ++l)
        __builtin_memcpy(out + (l0 + l) * out_stride + r0, &block[l], static_cast<unsigned long>(here) * 4);
    }
  }
}

void transpose(const Tile& tile, float* out, int64_t out_stride) {
  transpose_words(tile.columns, tile.rows, reinterpret_cast<int*>(out), out_stride, [&](int64_t c, int64_t l) {
    Words w;
    __builtin_memcpy(&w, tile.scores + c * tile.lanes + l, sizeof(w));
    return w;
  });
}

void transpose_pairs(const Tile& tile, const uint16_t* rounded, uint32_t* out, int64_t out_stride) {
  transpose_words((tile.columns + 1) / 2, tile.rows, reinterpret_cast<int*>(out), out_stride,
                  [&](int64_t pair, int64_t l) {
                    Halves even, odd{};
                    const uint16_t* from = rounded + 2 * pair * tile.lanes + l;
                    __builtin_memcpy(&even, from, sizeof(even));
                    if (2 * pair + 1 < tile.columns) __builtin_memcpy(&odd, from + tile.lanes, sizeof(odd));
                    return __builtin_convertvector(even, Words) | __builtin_convertvector(odd, Words) << 16;
                  });
}

void narrow(const float* __restrict in, uint16_t* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(in[i]);
}

void rectify(const float* in, const uint16_t* gate, uint16_t* out, int64_t count) {
  if (!gate) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(in[i] < 0.0f ? 0.0f : in[i]);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = (gate[i] & 0x7fff) ? to_bf16(in[i]) : uint16_t{0};
}

void add_narrow(const float* __restrict in, const uint16_t* __restrict other, uint16_t* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = to_bf16(in[i] + float_of(static_cast<int>(static_cast<unsigned>(other[i]) << 16)));
}

void divide(const float* __restrict in, float divisor, float* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = in[i] / divisor;
}

void widen_bf16(const uint16_t* __restrict in, float* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = float_of(static_cast<int>(static_cast<unsigned>(in[i]) << 16));
}

// The exponent is rebased by a multiplication, which also normalises subnormals; infinities and NaN keep their payload.
void widen_fp16(const uint16_t* __restrict in, float* __restrict out, int64_t count) {
  const float rebase = float_of(0x77800000);  // 2^112
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const int half = in[i], magnitude = (half & 0x7fff) << 13;
    const int finite = bits_of(float_of(magnitude) * rebase);
    const int special = magnitude | 0x7f800000;
    out[i] = float_of(((half & 0x7c00) == 0x7c00 ? special : finite) | (half & 0x8000) << 16);
  }
}

void interleave(const uint16_t* __restrict even, const uint16_t* __restrict odd, uint32_t* __restrict out,
                int64_t count) {
  if (!odd) {
    for (int64_t i = 0; i < count; ++i) out[i] = even[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
}
