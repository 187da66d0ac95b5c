// The bodies of the row kernels. Included once by each rows_*.cpp, after its target pragma and its FUSED_NCE_ISA; so no
// header with inline functions may come in here.
#include "../atoms.h"
#include "../params.h"

namespace fused_nce {
namespace FUSED_NCE_ISA {
namespace {

// Walks the columns of a tile: the image of each, and where in it the column lies.
class Columns {
 public:
  Columns(const Tile& tile, const Scoring& scoring)
      : n_c_(scoring.n_c), image_(tile.first_column / n_c_), location_(tile.first_column - image_ * n_c_) {}

  int image() const { return static_cast<int>(image_); }
  int64_t location() const { return location_; }

  void next() {
    if (++location_ < n_c_) return;
    location_ = 0;
    ++image_;
  }

 private:
  const int64_t n_c_;
  int64_t image_, location_;
};

struct Transform {
  float scale, clip, inverse_clip;
  explicit Transform(const Scoring& scoring)
      : scale(scoring.scale), clip(scoring.clip), inverse_clip(scoring.clip > 0.0f ? 1.0f / scoring.clip : 0.0f) {}
};

// exp(t - shift); where the clip bounds t there is no shift, and no range to check.
template <bool kShift>
FUSED_NCE_HD float exp_shifted(float t, const float* shift, int lane) {
  return kShift ? exp_value(t - shift[lane]) : exp_bounded(t);
}

// Raises the shift of each lane to its largest negative score in the tile, and rescales what the old one had summed.
template <bool kClip, bool kItself>
void raise_shift(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const Transform f(scoring);
  const int lanes = static_cast<int>(tile.lanes);
  float* __restrict max = acc.max;
  float* __restrict shift = acc.shift;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  Columns column(tile, scoring);
  for (int64_t c = 0; c < tile.columns; ++c, column.next()) {
    const float* __restrict scores = tile.scores + c * tile.lanes;
    const int image = column.image(), index = static_cast<int>(tile.first_column + c);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float s = scores[l] * f.scale;
      const bool negative = ids[l] != image && !(kItself && itself[l] == index);
      max[l] = negative && s > max[l] ? s : max[l];
    }
  }
  for (int l = 0; l < lanes; ++l) {
    const float top = transform<kClip>(max[l], f.clip, f.inverse_clip).value;
    const float after = shift_of(max[l] == -infinity() ? max[l] : top);
    const float factor = acc.sum[l] == 0.0f ? 0.0f : exp_value(shift[l] - after);
    acc.sum[l] *= factor;
    acc.sum_error[l] *= factor;
    shift[l] = after;
  }
}

// Folds kColumns columns at once. Four of them share the Kahan steps and the accumulators' loads and stores, which
// were a third of the instructions.
template <bool kClip, bool kShift, bool kItself, int kColumns>
inline void fold_columns(const Tile& tile, int64_t first, const Transform& f, const int* image,
                         const Accumulators& acc) {
  const int lanes = static_cast<int>(tile.lanes);
  const float* __restrict scores = tile.scores + first * tile.lanes;
  float* __restrict max = acc.max;
  float* __restrict sum = acc.sum;
  float* __restrict sum_error = acc.sum_error;
  float* __restrict square = acc.square;
  float* __restrict square_error = acc.square_error;
  float* __restrict bad = acc.bad;
  const float* __restrict shift = acc.shift;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  const int index = static_cast<int>(tile.first_column + first);
  const int i0 = image[0], i1 = image[kColumns > 1], i2 = image[kColumns > 1 ? 2 : 0], i3 = image[kColumns > 1 ? 3 : 0];
#pragma omp simd
  for (int l = 0; l < lanes; ++l) {
    float top = max[l], e[kColumns], s[kColumns];
    const auto term = [&](int u, int its_image) __attribute__((always_inline)) {
      s[u] = scores[u * lanes + l] * f.scale;
      const bool out = kItself && itself[l] == index + u;
      if (kItself) s[u] = out ? 0.0f : s[u];
      const bool negative = ids[l] != its_image && !out;
      const float t = transform<kClip>(s[u], f.clip, f.inverse_clip).value;
      const float x = exp_shifted<kShift>(t, shift, l);
      e[u] = negative ? x : 0.0f;
      if (!kShift) top = negative && s[u] > top ? s[u] : top;
    };
    term(0, i0);
    if constexpr (kColumns == 4) {
      term(1, i1);
      term(2, i2);
      term(3, i3);
      add_exactly(sum[l], sum_error[l], (e[0] + e[1]) + (e[2] + e[3]));
      add_exactly(square[l], square_error[l], (s[0] * s[0] + s[1] * s[1]) + (s[2] * s[2] + s[3] * s[3]));
      bad[l] += (s[0] * 0.0f + s[1] * 0.0f) + (s[2] * 0.0f + s[3] * 0.0f);
    } else {
      add_exactly(sum[l], sum_error[l], e[0]);
      add_exactly(square[l], square_error[l], s[0] * s[0]);
      bad[l] += s[0] * 0.0f;
    }
    max[l] = top;
  }
}

template <bool kClip, bool kShift, bool kItself>
void fold_tile(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  const Transform f(scoring);
  if (kShift) raise_shift<kClip, kItself>(tile, scoring, acc);
  Columns column(tile, scoring);
  int image[4];
  for (int64_t c = 0; c < tile.columns;) {
    const int64_t step = tile.columns - c >= 4 ? 4 : 1;
    for (int64_t u = 0; u < step; ++u, column.next()) image[u] = column.image();
    if (step == 4) fold_columns<kClip, kShift, kItself, 4>(tile, c, f, image, acc);
    else fold_columns<kClip, kShift, kItself, 1>(tile, c, f, image, acc);
    c += step;
  }
}

template <bool kItself>
void fold_as(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  if (needs_no_shift(scoring.clip)) return fold_tile<true, false, kItself>(tile, scoring, acc);
  if (scoring.clip > 0.0f) return fold_tile<true, true, kItself>(tile, scoring, acc);
  fold_tile<false, true, kItself>(tile, scoring, acc);
}

void fold(const Tile& tile, const Scoring& scoring, const Accumulators& acc) {
  if (tile.itself) fold_as<true>(tile, scoring, acc);
  else fold_as<false>(tile, scoring, acc);
}

// Row by row, since a row knows its image: the columns of that image which lie in this tile.
void positives(const Tile& tile, const Scoring& scoring, int64_t n_pos, float* pos) {
  const Transform f(scoring);
  for (int64_t l = 0; l < tile.rows; ++l) {
    if (tile.ids[l] < 0) continue;
    const int64_t first = tile.ids[l] * scoring.n_c - tile.first_column, last = first + scoring.n_c;
    const long long own = own_place(tile.ids, tile.itself, scoring.n_c, l);
    for (int64_t c = first < 0 ? 0 : first; c < (last < tile.columns ? last : tile.columns); ++c) {
      const int64_t place = c - first;
      if (place == own) continue;
      const float s = tile.scores[c * tile.lanes + l] * f.scale;
      const float t = scoring.clip > 0.0f ? tanh_clip(s, f.clip, f.inverse_clip).value : s;
      pos[(tile.first_row + l) * n_pos + place - (own >= 0 && place > own)] = t;
    }
  }
}

// Round to nearest even; a NaN whose payload would round away stays a NaN.
FUSED_NCE_HD uint16_t to_bf16(float x) {
  const unsigned bits = static_cast<unsigned>(bits_of(x));
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

// Weights as the GEMMs want them: float, over the scores, or bfloat16 in an array of their own.
struct InPlace {
  using Element = float;
  static Element of(float weight) { return weight; }
};
struct Rounded {
  using Element = uint16_t;
  static Element of(float weight) { return to_bf16(weight); }
};

template <bool kClip, bool kShift, bool kItself, bool kScale, class Out>
void weigh_tile(const Tile& tile, const Scoring& scoring, const Coefficients& row, typename Out::Element* out,
                float* d_scale) {
  const Transform f(scoring);
  const int lanes = static_cast<int>(tile.lanes);
  const float* __restrict shift = row.shift;
  const float* __restrict inverse = row.inverse;
  const float* __restrict d_neg_lse = row.d_neg_lse;
  const float* __restrict two_d_square = row.two_d_square;
  const int* __restrict ids = tile.ids;
  const int* __restrict itself = tile.itself;
  float* __restrict sum = d_scale;
  Columns column(tile, scoring);
  for (int64_t c = 0; c < tile.columns; ++c, column.next()) {
    const float* scores = tile.scores + c * tile.lanes;  // and `to` may be the same
    typename Out::Element* to = out + c * tile.lanes;
    const float* __restrict d_pos = row.d_pos + column.location() * tile.lanes;
    const int image = column.image(), index = static_cast<int>(tile.first_column + c);
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const float r = scores[l], s = r * f.scale;
      const Score t = transform<kClip>(s, f.clip, f.inverse_clip);
      const float e = exp_shifted<kShift>(t.value, shift, l);
      const float negative = negative_weight(e, inverse[l], d_neg_lse[l], t.slope), positive = d_pos[l] * t.slope;
      float weight = (ids[l] == image ? positive : negative) + two_d_square[l] * s;
      if (kItself) weight = itself[l] == index ? 0.0f : weight;
      if (kScale) sum[l] += weight * r;
      to[l] = Out::of(f.scale * weight);
    }
  }
}

template <bool kClip, bool kShift, bool kItself, class Out>
void weigh_either(const Tile& tile, const Scoring& scoring, const Coefficients& row, typename Out::Element* out,
                  float* d_scale) {
  if (d_scale) weigh_tile<kClip, kShift, kItself, true, Out>(tile, scoring, row, out, d_scale);
  else weigh_tile<kClip, kShift, kItself, false, Out>(tile, scoring, row, out, d_scale);
}

template <bool kItself, class Out>
void weigh_as(const Tile& tile, const Scoring& scoring, const Coefficients& row, typename Out::Element* out,
              float* d_scale) {
  if (needs_no_shift(scoring.clip)) return weigh_either<true, false, kItself, Out>(tile, scoring, row, out, d_scale);
  if (scoring.clip > 0.0f) return weigh_either<true, true, kItself, Out>(tile, scoring, row, out, d_scale);
  weigh_either<false, true, kItself, Out>(tile, scoring, row, out, d_scale);
}

void weigh(const Tile& tile, const Scoring& scoring, const Coefficients& row, uint16_t* rounded, float* d_scale) {
  if (rounded && tile.itself) weigh_as<true, Rounded>(tile, scoring, row, rounded, d_scale);
  else if (rounded) weigh_as<false, Rounded>(tile, scoring, row, rounded, d_scale);
  else if (tile.itself) weigh_as<true, InPlace>(tile, scoring, row, tile.scores, d_scale);
  else weigh_as<false, InPlace>(tile, scoring, row, tile.scores, d_scale);
}

// kVector 32-bit words: one register where the instruction set has one as wide.
constexpr int kVector = FUSED_NCE_VECTOR;
typedef int Words __attribute__((vector_size(kVector * 4)));
typedef uint16_t Halves __attribute__((vector_size(kVector * 2)));

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

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {FUSED_NCE_ISA_NAME, fold,   positives,  weigh,      transpose,
                            transpose_pairs,    narrow, interleave, widen_bf16, widen_fp16};

}  // namespace FUSED_NCE_ISA
}  // namespace fused_nce
